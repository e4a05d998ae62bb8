"""What trains in a run: which parameters ask for gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class TrainedParameters:
    """The parameters of what a run trains, by block; until it ends, those of other blocks ask for no gradients.

    What is frozen or thawed before the run, or by a callback in it, is left as it is. (A pass reaches no block but its own:
    nothing has to be frozen from turn to turn.)

    Args:
        model: whose parameters.
        blocks: that the run trains.
        train_shared: whether what belongs to no block trains, too.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int], train_shared: bool):
        self._model, self._set_aside = model, []
        self._owners = {None, *blocks} if train_shared else set(blocks)
        self.of_block: dict[int | None, list[nn.Parameter]] = {None: [], **{block: [] for block in blocks}}

    def __enter__(self) -> TrainedParameters:
        for name, parameter in self._model.named_parameters():
            owner = self._model.block_of_parameter(name)
            if owner in self._owners:
                self.of_block[owner].append(parameter)
            elif parameter.requires_grad:
                self._set_aside.append(parameter)
                parameter.requires_grad_(False)
        return self

    def __exit__(self, *error) -> None:
        for parameter in self._set_aside:
            parameter.requires_grad_(True)
