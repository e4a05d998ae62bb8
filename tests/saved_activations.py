"""What a forward pass keeps for its backward pass, counted by autograd's own hooks: the other way to what ledgers follow."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that forward passes inside this context keep for their backward.

    `bytes` is set at the end of the context: what was saved and freed again by then is not counted. Tensors are
    counted once by storage; parameters, which are there anyway, are not counted.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._held: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self.bytes = 0
        super().__init__(self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> SavedActivations:
        super().__enter__()
        return self

    def __exit__(self, *args) -> None:
        super().__exit__(*args)
        storages = (saved.tensor.untyped_storage() for saved in self._held)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.bytes = sum(size for address, size in sizes.items() if address not in self._parameters)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._held.add(saved)
        return saved


class _Saved:
    """A tensor as autograd keeps it: dies with the graph."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
