"""What trains in a run: which parameters ask for gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def trained_parameters(
    model: nn.Module, blocks: Sequence[int], train_shared: bool
) -> Iterator[dict[int | None, list[nn.Parameter]]]:
    """The parameters of what a run trains, by block; until it ends, those of other blocks ask for no gradients.

    What is frozen or thawed before the run, or by a callback in it, is left as it is. (A pass reaches no block but its own:
    nothing has to be frozen from turn to turn.)

    Args:
        blocks: that the run trains.
        train_shared: whether what belongs to no block (None) trains, too.
    """
    trained: dict[int | None, list[nn.Parameter]] = {None: [], **{block: [] for block in blocks}}
    set_aside = []
    for name, parameter in model.named_parameters():
        owner = model.block_of_parameter(name)
        if owner in blocks or owner is None and train_shared:
            trained[owner].append(parameter)
        elif parameter.requires_grad:
            set_aside.append(parameter.requires_grad_(False))
    try:
        yield trained
    finally:
        for parameter in set_aside:
            parameter.requires_grad_(True)
