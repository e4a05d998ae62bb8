"""What autograd keeps of a copy until the backward pass: which one it was, not the copy."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Origin:
    """Where a copy on the device is from.

    Args:
        name: of the unit, for messages.
        fetch: gives the copy, brought to the device again if it has left: `(tensor, version of its parameter)`.
        dtype, version: of the copy, and of its parameter when it was made.
    """

    name: str
    fetch: Callable[[], tuple[torch.Tensor, int]]
    dtype: torch.dtype
    version: int


#: Storage of a copy -> its origin, of the copies that are there
Origins = dict[Hashable, Origin]


class SavedAsOrigins(torch.autograd.graph.saved_tensors_hooks):
    """While this is entered, autograd keeps the origin of a copy, and anything else as it would.

    Hooks that are there already, as checkpointing's, see all else: of nested hooks PyTorch calls the inner alone.
    """

    def __init__(self, origins: Origins):
        # (No public function tells which hooks there are; a test fails if this one goes.)
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack_other, unpack_other = outer or (lambda tensor: tensor, lambda tensor: tensor)

        def pack(tensor: torch.Tensor) -> _View | _Other:
            origin = origins.get(storage_id(tensor)) if tensor.layout == torch.strided else None
            if origin is None or origin.dtype != tensor.dtype:
                return _Other(pack_other(tensor.detach()))  # (what a node has put out would hold the node)
            return _View(origin, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(kept: _View | _Other) -> torch.Tensor:
            return unpack_other(kept.packed) if isinstance(kept, _Other) else kept.fetched()

        super().__init__(pack, unpack)


@dataclass(frozen=True)
class _View:
    origin: Origin
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def fetched(self) -> torch.Tensor:
        copy, version = self.origin.fetch()
        if version != self.origin.version:  # as PyTorch does of what it saves itself
            raise RuntimeError(
                f"a weight of {self.origin.name!r} that the backward pass needs was modified by an inplace operation after "
                f"the forward pass: it is at version {version}, and was at {self.origin.version}"
            )
        return copy.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Other:
    """What other hooks have packed."""

    packed: Any


def storage_id(tensor: torch.Tensor) -> Hashable:
    """Which memory a tensor is in."""
    return tensor.untyped_storage()._cdata
