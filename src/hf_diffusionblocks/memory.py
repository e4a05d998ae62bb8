"""Bytes, counted rather than timed."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that forward passes inside this context keep for their backward.

    Tensors are counted once by storage; parameters, which are there anyway, are not counted.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.bytes = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedActivations:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def gradient_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of the gradients that parameters hold now."""
    return sum(p.grad.nbytes for p in parameters if p.grad is not None)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state now."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
