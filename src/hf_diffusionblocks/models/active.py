"""What trains now: which parameters ask for gradients, and which modules drop nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, then give every sub-module back the mode it had."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


class TrainedParameters:
    """The parameters that a run trains, by block; until it ends, no others ask for gradients.

    Args:
        model: whose parameters.
        blocks: that the run trains.
        train_shared: whether what belongs to no block trains, too.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int], train_shared: bool):
        self.model = model
        self._owners = {None, *blocks} if train_shared else set(blocks)
        self._asked: list[nn.Parameter] = []
        self.of_block: dict[int | None, list[nn.Parameter]] = {None: [], **{block: [] for block in blocks}}

    def __enter__(self) -> TrainedParameters:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            self._asked.append(parameter)
            owner = self.model.block_of_parameter(name)
            if owner in self._owners:
                self.of_block[owner].append(parameter)
            parameter.requires_grad_(owner in self._owners)
        return self

    def activate(self, active_block: int) -> None:
        """Have no block but the active one ask for gradients."""
        for block, parameters in self.of_block.items():
            if block is not None:
                for parameter in parameters:
                    parameter.requires_grad_(block == active_block)

    def __exit__(self, *error) -> None:
        for parameter in self._asked:
            parameter.requires_grad_(True)
