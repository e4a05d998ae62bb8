"""The stream: which units are on the device, when they come and when they go."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from .copies import Copies
from .gradients import tied
from .loss import CrossEntropyInParts, DeferredLogits, is_large
from .saved import Origin, Origins, SavedAsOrigins, storage_id
from .units import Copy, Key, Unit, keys_of


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
        self._there: dict[Unit, dict[Hashable, Copy]] = {}
        self._arrivals: dict[Unit, torch.Event | None] = {}
        self._origins: Origins = {}
        self._storages: dict[Unit, list[StorageWeakRef]] = {}
        self._before: Unit | None = None
        self._current: Unit | None = None
        self._follows: dict[tuple[Unit | None, Unit | None], tuple[Unit, torch.dtype | None]] = {}
        self._updates: Counter[int] = Counter()  # steps of optimizers, by the id of what they have moved
        self._round = 0  # forward passes of the model
        self._backward = -1  # the backward pass that fetched last, as autograd numbers them
        self._computing = 0
        self.one_thread = threading.RLock()  #: runs the model at a time
        self._deferring: nn.Module | None = None  # the head whose logits are

    @property
    def copied(self) -> dict[str, int]:
        """Bytes so far."""
        return {"to_device": self._copies.to_device_bytes, "to_host": self._copies.to_host_bytes}

    @property
    def copies_there(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Parameters whose copies are on the device now, each with its copy."""
        return [(copy.parameter, copy.tensor) for copies in self._there.values() for copy in copies.values()]

    def watch_copies(self, watch: Callable[[torch.Tensor, torch.Tensor, bool], None] | None) -> None:
        """Have a function called with what is copied, its copy, and whether that is in host memory; None ends it."""
        self._copies.watch = watch

    @property
    def computing(self) -> bool:
        """Whether the model runs now."""
        return self._computing > 0

    def alone(self) -> AbstractContextManager:
        """While this is entered, no other thread runs the model. (But those of backward passes, which somebody may wait for.)"""
        return nullcontext() if torch._C._current_graph_task_id() >= 0 else self.one_thread

    @contextmanager
    def running(self) -> Iterator[bool]:
        """While a forward pass of the model runs; gives whether it is the outermost."""
        with self.one_thread:
            self._computing += 1
            is_outermost = self._computing == 1
            self._round += is_outermost
            try:
                with SavedAsOrigins(self._origins) if is_outermost else nullcontext():
                    yield is_outermost
                if is_outermost:
                    self._wait_until_used_ones_have_left()
            finally:
                self._computing -= 1

    def _wait_until_used_ones_have_left(self) -> None:
        """At the end of a pass: its caller may write into weights, and what it computes with has left host memory then."""
        if self._arrivals.get(self._current) is not None:
            self._arrivals[self._current].synchronize()

    def let_go(self) -> None:
        """Hold nothing on the device, what stays included; it comes again when it is used."""
        for unit in list(self._there):
            self._evict(unit)

    def __deepcopy__(self, memo: dict) -> Stream:
        return self  # a copy of a model takes part in the same

    # ---- a unit's call

    def run(self, unit: Unit, module: nn.Module, forward, args: tuple, kwargs: dict[str, Any]):
        """Call a unit's own forward on its copies."""
        unit.belongs_to(module)
        self._round += not self._computing  # (a layer that is called by itself)
        if unit.depth or not any(isinstance(each, nn.Parameter) for each in module.parameters()):
            return forward(*args, **kwargs)  # (lent already: by itself, or by the unit that it is a part of)
        if module is self._deferring and is_large(args[0].shape[:-1].numel(), module.out_features):
            return self._deferred(unit, module, forward, *args)
        if unit.checkpointed_here and module.training and torch.is_grad_enabled() and not _writes_to_cache(args, kwargs):
            return checkpoint(self._run_lent, unit, module, forward, args, kwargs, use_reentrant=False)
        return self._run_lent(unit, module, forward, args, kwargs)

    def _run_lent(self, unit: Unit, module: nn.Module, forward, args: tuple, kwargs: dict[str, Any]):
        with self.lent(unit, module):
            return forward(*args, **kwargs)

    @contextmanager
    def lent(self, unit: Unit, module: nn.Module) -> Iterator[None]:
        """While this runs, the parameters of a module and of those inside are copies on the device. What autograd wants to
        keep of them is fetched again in the backward pass."""
        autocast = autocast_dtype(self.device)
        keys = keys_of(module, autocast)
        if not keys:  # all has been lent already, with what is around it
            yield
            return
        copies = self.use(unit, module, autocast)
        lent = {each.id: tied(each.parameter, copies[each.id].tensor, self._copies) for each in keys.values()}
        inside = [child for child in module.modules() if child is not module]
        unit.depth += 1
        try:
            for (child, name), each in keys.items():
                child._parameters[name] = lent[each.id]
            # (what is checkpointed inside would run again when nothing is lent; the unit does, as a whole)
            with SavedAsOrigins(self._origins), without_checkpointing(inside), statistics_taken_once(module):
                yield
        finally:
            unit.depth -= 1
            for (child, name), each in keys.items():
                # (There peft, which parametrizes weights for a call, puts back what is no parameter.)
                child._buffers.pop(name, None)
                child._parameters[name] = each.parameter

    @contextmanager
    def deferring_logits(self, head: nn.Module | None) -> Iterator[None]:
        """While this runs, a head gives its logits when they are looked at."""
        before, self._deferring = self._deferring, head
        try:
            yield
        finally:
            self._deferring = before

    def _deferred(self, unit: Unit, head: nn.Linear, forward, hidden: torch.Tensor) -> DeferredLogits:
        autocast = autocast_dtype(self.device)
        was = self._moves_of(head)

        def all_logits(hidden: torch.Tensor) -> torch.Tensor:
            if self._moves_of(head) != was:
                raise RuntimeError(f"logits of {unit.name!r} are computed when they are looked at: do so before weights move")
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                return self._run_lent(unit, head, forward, (hidden,), {})

        def summed_loss(rows: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
            with self.lent(unit, head), torch.autocast(self.device.type, enabled=False):
                weight, bias = head.weight, head.bias
                return CrossEntropyInParts.apply(rows.to(weight.dtype), weight, bias, targets, ignore_index)

        dtype = autocast or hidden.dtype
        return DeferredLogits(hidden, all_logits, summed_loss, head.out_features, dtype)

    def _moves_of(self, module: nn.Module) -> list[tuple[int, int]]:
        return [(p._version, self._updates[id(p)]) for p in module.parameters()]

    def read(self, unit: Unit, module: nn.Module, name: str) -> torch.Tensor:
        """A parameter that is read while the model runs, but not by its own module: its copy on the device, in the dtype it has
        (autocast casts what is computed with, and who reads it may ask for float32)."""
        unit.belongs_to(module)
        key = next(each for (child, of), each in keys_of(module, None).items() if child is module and of == name)
        return tied(key.parameter, self.use(unit, module, None)[key.id].tensor, self._copies)

    # ---- comes and goes

    def use(self, unit: Unit, module: nn.Module, autocast: torch.dtype | None) -> Mapping[Hashable, Copy]:
        """A unit's copies, for the device to compute with from here on; the unit that follows is on its way then."""
        if unit is not self._current:
            self._follows[self._before, self._current] = unit, autocast
            self._before, self._current = self._current, unit
            self._copies.next_unit()
        backward = torch._C._current_graph_task_id()
        if backward not in (-1, self._backward):  # (one without gradients of weights has no other reason to wait)
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._wait_until_used_ones_have_left)
        following, cast = self._follows.get((self._before, unit), (None, None))
        for other in [each for each in self._there if each not in (unit, following) and not each.stays]:
            self._evict(other)
        self._fetch(unit, module, autocast)
        self._copies.wait_for(self._arrivals.get(unit))
        if following is not None and following.module is not None:  # (what is there may be older than the last step)
            self._fetch(following, following.module, cast)
        return self._there[unit]

    def _fetch(self, unit: Unit, module: nn.Module, autocast: torch.dtype | None) -> None:
        there = self._there.setdefault(unit, {})
        wanted = {each.id: each for each in keys_of(module, autocast).values()}
        missing = [each for each in wanted.values() if not self._is_current(there.get(each.id), each)]
        if not missing:
            return
        self._forget(unit, [each.id for each in missing])
        tensors, self._arrivals[unit] = self._copies.fetch([(each.parameter, each.dtype) for each in missing])
        for each, tensor in zip(missing, tensors):
            copy = there[each.id] = Copy.of(each, tensor, self._updates[id(each.parameter)], self._round)
            self._origins[storage_id(tensor)] = Origin(
                unit.name, partial(self._fetched_again, unit, autocast, each.id), each.dtype, copy.version
            )
        self._count(unit, tensors)

    def _fetched_again(self, unit: Unit, autocast: torch.dtype | None, id_: Hashable) -> tuple[torch.Tensor, int]:
        there = self._there.get(unit, {}) if unit is self._current else {}
        copy = there[id_] if id_ in there else self.use(unit, unit.module, autocast).get(id_)
        if copy is None:
            raise RuntimeError(f"a weight of {unit.name!r} that the backward pass needs was replaced after the forward pass")
        return copy.tensor, copy.parameter._version

    def _is_current(self, copy: Copy | None, key: Key) -> bool:
        updates = self._updates[id(key.parameter)]
        return copy is not None and copy.parameter is key.parameter and copy.is_current(updates, self._round)

    def _forget(self, unit: Unit, ids: Iterable[Hashable]) -> None:
        copies = [self._there[unit].pop(id_) for id_ in ids if id_ in self._there[unit]]
        for copy in copies:
            self._origins.pop(storage_id(copy.tensor), None)
        if copies:  # (older than their parameters, also: the device may compute with them still)
            self._copies.let_go()

    def _evict(self, unit: Unit) -> None:
        self._forget(unit, list(self._there[unit]))
        del self._there[unit]
        self._arrivals.pop(unit, None)

    def _count(self, unit: Unit, tensors: list[torch.Tensor]) -> None:
        self._storages.setdefault(unit, []).extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        for other, storages in list(self._storages.items()):
            alive = [each for each in storages if not each.expired()]
            self._storages[other] = alive
            if not alive:
                del self._storages[other]
        self.peak_units = max(self.peak_units, len(self._storages))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to now, if it is on.

    Raises:
        ValueError: it is float16, whose gradients want scaling.
    """
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if dtype == torch.float16:
        raise ValueError("fp16=True cannot be streamed: its gradients are scaled and unscaled on the device; use bf16=True")
    return dtype


@contextmanager
def without_checkpointing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this runs, these modules do not checkpoint."""
    on = [module for module in modules if getattr(module, "gradient_checkpointing", False) is True]
    try:
        for module in on:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


@contextmanager
def statistics_taken_once(module: nn.Module) -> Iterator[None]:
    """While this runs in a backward pass, which repeats a forward, batch norms inside do not count the batch again."""
    repeats = torch._C._current_graph_task_id() >= 0  # (no public function tells; a test fails if this one goes)
    counting = [each for each in module.modules() if repeats and each.training and getattr(each, "track_running_stats", False)]
    own = {each: each._buffers for each in counting}
    try:
        for each, buffers in own.items():
            each._buffers = {name: value if value is None else value.clone() for name, value in buffers.items()}
        yield
    finally:
        for each, buffers in own.items():
            each._buffers = buffers


def counting_once(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a checkpointed forward of the module runs in, and its repetition."""
    return nullcontext(), statistics_taken_once(module)


def _writes_to_cache(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call that is run twice would write its keys twice."""
    return any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
