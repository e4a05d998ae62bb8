"""The stream: which units are on the device, when they come and when they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from .copies import Copies
from .gradients import tied
from .units import Copy, Key, Unit, keys_of, storage_id, storage_ref


class Stream:
    """Brings the weights of units to the device when they are used, and lets them go.

    Two units are held at most: the one in use, and the one that follows it by the order learned, forward and backward; and
    those that stay.

    Args:
        device: where units run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_units = 0  #: the most units whose weights were on the device at once, so far
        self._copies = Copies(device)
        self._there: dict[Unit, dict[Any, Copy]] = {}
        self._arrivals: dict[Unit, torch.Event | None] = {}
        self._storages: dict[Unit, list[StorageWeakRef]] = {}
        self._before: Unit | None = None
        self._current: Unit | None = None
        self._follows: dict[tuple[Unit | None, Unit | None], tuple[Unit, torch.dtype | None]] = {}
        self._updates = 0  # steps of optimizers
        self._round = 0  # forward passes of the model
        self._computing = 0

    @property
    def copied(self) -> dict[str, int]:
        """Bytes so far."""
        return {"to_device": self._copies.to_device_bytes, "to_host": self._copies.to_host_bytes}

    @property
    def computing(self) -> bool:
        """Whether the model runs now."""
        return self._computing > 0

    @contextmanager
    def running(self) -> Iterator[bool]:
        """While a forward pass of the model runs; gives whether it is the outermost."""
        self._computing += 1
        self._round += self._computing == 1
        try:
            yield self._computing == 1
        finally:
            self._computing -= 1

    def weights_changed(self) -> None:
        """To be called when parameters that train have been moved."""
        self._updates += 1

    def let_go(self) -> None:
        """Hold nothing on the device, what stays included; it comes again when it is used."""
        self._there.clear()
        self._arrivals.clear()

    def __deepcopy__(self, memo: dict) -> Stream:
        return self  # a copy of a model takes part in the same

    # ---- a unit's call

    def run(self, unit: Unit, module: nn.Module, forward, args: tuple, kwargs: dict[str, Any]):
        """Call a unit's own forward on its copies."""
        unit.belongs_to(module)
        if unit.depth or not any(isinstance(each, nn.Parameter) for each in module.parameters()):
            return forward(*args, **kwargs)  # (lent already: by itself, or by the unit that it is a part of)
        if unit.checkpointed_here and module.training and torch.is_grad_enabled() and not _writes_to_cache(args, kwargs):
            return checkpoint(self._run_lent, unit, module, forward, args, kwargs, use_reentrant=False)
        return self._run_lent(unit, module, forward, args, kwargs)

    def _run_lent(self, unit: Unit, module: nn.Module, forward, args: tuple, kwargs: dict[str, Any]):
        with self.lent(unit, module):
            return forward(*args, **kwargs)

    @contextmanager
    def lent(self, unit: Unit, module: nn.Module) -> Iterator[None]:
        """While this runs, the parameters of a module and of those inside are copies on the device. What autograd wants to keep
        of them is fetched again in the backward pass."""
        autocast = autocast_dtype(self.device)
        keys = keys_of(module, autocast)
        copies = self.use(unit, module, autocast)
        lent = {each.id: tied(each.parameter, copies[each.id].tensor, self._copies) for each in keys.values()}
        checkpointing = [child for child in module.modules() if child is not module and _checkpoints(child)]
        unit.depth += 1
        try:
            for child in checkpointing:  # it would run again in the backward pass when nothing is lent; the unit does as a whole
                child.gradient_checkpointing = False
            for (child, name), each in keys.items():
                child._parameters[name] = lent[each.id]
            with _Handles(self, unit, copies, autocast):
                yield
        finally:
            unit.depth -= 1
            for (child, name), each in keys.items():
                child._parameters[name] = each.parameter
            for child in checkpointing:
                child.gradient_checkpointing = True

    def read(self, unit: Unit, module: nn.Module, name: str) -> torch.Tensor:
        """A parameter that is read while the model runs, but not by its own module: its copy on the device."""
        unit.belongs_to(module)
        autocast = autocast_dtype(self.device)
        key = next(each for (child, of), each in keys_of(module, autocast).items() if child is module and of == name)
        return tied(key.parameter, self.use(unit, module, autocast)[key.id].tensor, self._copies)

    # ---- comes and goes

    def use(self, unit: Unit, module: nn.Module, autocast: torch.dtype | None) -> Mapping[Any, Copy]:
        """A unit's copies, for the device to compute with from here on; the unit that follows is on its way then."""
        if unit is not self._current:
            self._follows[self._before, self._current] = unit, autocast
            self._before, self._current = self._current, unit
            self._copies.next_unit()
            self._evict_all_but(unit)
        self._fetch(unit, module, autocast)
        self._copies.wait_for(self._arrivals.get(unit))
        following, cast = self._follows.get((self._before, self._current), (None, None))
        if following is not None and following is not unit and following.module is not None and following not in self._there:
            self._evict_all_but(unit)
            self._fetch(following, following.module, cast)
        return self._there[unit]

    def _fetch(self, unit: Unit, module: nn.Module, autocast: torch.dtype | None) -> None:
        there = self._there.setdefault(unit, {})
        wanted: dict[Any, Key] = {each.id: each for each in keys_of(module, autocast).values()}
        missing = [
            each for id_, each in wanted.items()
            if id_ not in there or there[id_].parameter is not each.parameter
            or not there[id_].is_current(self._updates, self._round)
        ]  # fmt: skip
        if not missing:
            return
        for each in missing:
            there.pop(each.id, None)
        tensors, self._arrivals[unit] = self._copies.fetch([(each.parameter, each.dtype) for each in missing])
        for each, tensor in zip(missing, tensors):
            there[each.id] = Copy.of(each, tensor, self._updates)
            there[each.id].looked_at = self._round
        self._count(unit, tensors)

    def _evict_all_but(self, unit: Unit) -> None:
        for other in [each for each in self._there if each is not unit and not each.stays]:
            del self._there[other]
            self._arrivals.pop(other, None)

    def _count(self, unit: Unit, tensors: list[torch.Tensor]) -> None:
        self._storages.setdefault(unit, []).extend(storage_ref(tensor) for tensor in tensors)
        for other, storages in list(self._storages.items()):
            alive = [each for each in storages if not each.expired()]
            self._storages[other] = alive
            if not alive:
                del self._storages[other]
        self.peak_units = max(self.peak_units, len(self._storages))


class _Handles(torch.autograd.graph.saved_tensors_hooks):
    """Keeps, of a copy that autograd saves for the backward pass, only which it was.

    Hooks that are there already, as checkpointing's, see all else: of nested hooks PyTorch calls the inner alone.
    """

    def __init__(self, stream: Stream, unit: Unit, copies: Mapping[Any, Copy], autocast: torch.dtype | None):
        # (No public function tells which hooks there are; a test fails if this one goes.)
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack_other, unpack_other = outer or (lambda tensor: tensor, lambda tensor: tensor)
        saved_as = {storage_id(copy.tensor): (id_, copy.tensor.dtype, copy.version) for id_, copy in copies.items()}

        def pack(tensor: torch.Tensor):
            id_, dtype, version = _NO_COPY
            if tensor.layout == torch.strided:
                id_, dtype, version = saved_as.get(storage_id(tensor), _NO_COPY)
            if id_ is None or tensor.dtype != dtype:
                return _Other(pack_other(tensor))
            return _Handle(unit, autocast, id_, version, (tensor.size(), tensor.stride(), tensor.storage_offset()))

        def unpack(kept: _Handle | _Other) -> torch.Tensor:
            return kept.fetched_from(stream) if isinstance(kept, _Handle) else unpack_other(kept.packed)

        super().__init__(pack, unpack)


_NO_COPY = (None, None, None)


@dataclass(frozen=True)
class _Handle:
    """Which view of which copy autograd has saved."""

    unit: Unit
    autocast: torch.dtype | None
    id: Any
    version: int
    place: tuple

    def fetched_from(self, stream: Stream) -> torch.Tensor:
        copy = stream.use(self.unit, self.unit.module, self.autocast)[self.id]
        if copy.version != self.version:  # as PyTorch does of what it saves itself
            raise RuntimeError(
                f"a weight of {self.unit.name!r} that the backward pass needs was modified by an inplace operation after the "
                f"forward pass: it is at version {copy.version}, and was at {self.version}"
            )
        return copy.tensor.as_strided(*self.place)


class _Other:
    """What other hooks have packed."""

    def __init__(self, packed: Any):
        self.packed = packed


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to now, if it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _checkpoints(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True


def _writes_to_cache(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call that is run twice would write its keys twice."""
    return any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
