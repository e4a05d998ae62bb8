"""Inactive blocks in host memory: what is on the device while blocks take turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .copy_stream import CopyStream


class OffloadedBlocks:
    """Keeps blocks in host memory, and copies to the device what is needed there, and no more.

    That is the active block, whose optimizer state is copied while it runs; the parameters of the next one, copied ahead
    then, unless it is still there; and those of other blocks that run (earlier ones of carried context, later ones for
    the final loss, all in evaluation and inference), one at a time. What no block owns, or all read, stays on the device.

    Copies are made in order, beside computing, which waits for all so far where it needs one: a forward pass for a block
    that has just been asked for, a step for the block's state. The host waits for none: who reads parameters or state by
    other means calls `settle` before (`state_dict()` of the model and of the optimizer do). The copy is a copy even where
    "the device" is the CPU, which makes this testable without another.

    Args:
        model: whose blocks; its parameters move at once.
        device: where blocks run.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []  # of the optimizer
        stays = set(_new_head(model))
        self._parameters = {
            block: [p for p in model.block_parameters(block) if p not in stays] for block in model.resident_blocks
        }
        self._copies, self._pins = CopyStream(device), device.type == "cuda"
        self.copied = {"to_device": 0, "to_host": 0}  #: bytes, of blocks' parameters and state, so far
        self._active: int | None = None
        self._next: int | None = None
        self._on_device: set[int] = set()
        self._arriving: set[int] = set()  # of these, those that nothing has waited for
        self._changed: set[nn.Parameter] = set()  # that have trained there
        self._with_state: set[int] = set()
        # The host's own tensors of what is on the device.
        self._host: dict[nn.Parameter, torch.Tensor] = {}
        self._host_states: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        for parameter in (*model.shared_parameters(), *stays):
            parameter.data = parameter.data.to(device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        for parameter in self._block_parameters():
            parameter.data = self._pinned(parameter.data.cpu())

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Whose state moves with a block, and which waits for it, as who reads it does."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        for hook in self._hooks:
            hook.remove()
        stock = getattr(optimizer, "optimizer", optimizer)  # of Accelerate's wrapper
        self._hooks = [
            stock.register_step_pre_hook(lambda *_: self._join() if self._with_state else None),
            stock.register_state_dict_pre_hook(lambda *_: self.settle()),
        ]

    def activate(self, block: int | None, following: int | None = None) -> None:
        """Make a block the one that trains (None: none does), and start to copy the one that follows."""
        self._join()  # before anything leaves, which is not to be waited for
        for other in self._on_device - {block, following}:
            self._evict(other)
        for other in self._with_state - {block}:
            self._evict_state(other)
        self._active, self._next = block, following
        if block is not None:
            self._fetch(block)
            self._load_state(block)
            self._changed.update(parameter for parameter in self._parameters[block] if parameter.requires_grad)
        if following is not None:
            self._load(following)

    def rest(self) -> None:
        """No block trains for now. The one that did stays until another is used, without its optimizer state."""
        if self._active is not None:
            self._evict_state(self._active)
        self._active = self._next = None

    def use(self, block: int, following: int | None = None) -> None:
        """Have a block's parameters on the device, for a forward pass, and start to copy those of the one that runs next."""
        if block in self._arriving:
            self._join()
        if block not in self._on_device or following is not None:
            for other in self._on_device - {self._active, self._next, block}:
                self._evict(other)
        self._fetch(block)
        if following is not None:
            self._next = following
            self._load(following)

    def settle(self) -> None:
        """Have the host, and what the device computes, wait until all is where it is said to be."""
        self._join()
        self._copies.settle()

    def put_away(self) -> None:
        """Have all blocks in host memory."""
        self.activate(None)
        self.settle()

    @contextmanager
    def all_away(self) -> Iterator[None]:
        """The same, to read or write them there; afterwards those that train are on the device again."""
        active, following = self._active, self._next
        self.put_away()
        try:
            yield
        finally:
            self.activate(active, following)

    def write_back(self, block: int) -> None:
        """Copy a block's parameters, which another than training has changed, to the host."""
        for parameter in self._parameters[block]:
            self._host[parameter].copy_(parameter.data)

    def bytes_on_device(self) -> dict[str, int]:
        """What blocks have there now: "parameters" and "optimizer"."""
        states = (self._states(parameter) for block in self._with_state for parameter in self._parameters[block])
        return {
            "parameters": sum(p.nbytes for block in self._on_device for p in self._parameters[block]),
            "optimizer": sum(value.nbytes for state in states for value in state.values()),
        }

    def away(self) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
        """Parameters that are not on the device now, and those whose optimizer state is not."""
        return tuple(
            {parameter for block in self._parameters.keys() - there for parameter in self._parameters[block]}
            for there in (self._on_device, self._with_state)
        )

    # ---- moving

    def _join(self) -> None:
        self._copies.join()
        self._arriving.clear()

    def _fetch(self, block: int) -> None:
        """To be computed with now."""
        if block not in self._on_device:
            self._load(block)
            self._join()

    def _load(self, block: int) -> None:
        if block in self._on_device:
            return
        for parameter in self._parameters[block]:
            self._host[parameter] = parameter.data
            parameter.data = self._to_device(parameter.data)
        self._on_device.add(block)
        self._arriving.add(block)

    def _load_state(self, block: int) -> None:
        if block in self._with_state:
            return
        for parameter in self._parameters[block]:
            # (What a checkpoint has brought is not pinned yet.)
            self._host_states[parameter] = {name: self._pinned(value) for name, value in self._states(parameter).items()}
            for name, value in self._host_states[parameter].items():
                self.optimizer.state[parameter][name] = self._to_device(value)
        self._with_state.add(block)

    def _evict(self, block: int) -> None:
        self._evict_state(block)
        for parameter in self._parameters[block]:
            host = self._host.pop(parameter)
            parameter.data = self._to_host(parameter.data, host) if parameter in self._changed else host
            self._changed.discard(parameter)
        self._on_device.remove(block)
        self._arriving.discard(block)

    def _evict_state(self, block: int) -> None:
        if block not in self._with_state:
            return
        for parameter in self._parameters[block]:
            host_states = self._host_states.pop(parameter)
            for name, value in self._states(parameter).items():
                if name not in host_states:  # the block's first update has made it
                    host_states[name] = torch.empty_like(value, device="cpu", pin_memory=self._pins)
                self.optimizer.state[parameter][name] = self._to_host(value, host_states[name])
        self._with_state.remove(block)

    def _states(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of a parameter and wants beside it. (Counts of steps stay on the host, mostly.)"""
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        counts_too = self.optimizer is not None and any(
            group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups
        )
        return {name: value for name, value in state.items() if torch.is_tensor(value) and (value.dim() or counts_too)}

    def _to_host(self, value: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
        self.copied["to_host"] += value.nbytes
        return self._copies.to_host(value, host)

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        self.copied["to_device"] += host.nbytes
        return self._copies.to_device(host)

    def _pinned(self, host: torch.Tensor) -> torch.Tensor:
        return host.pin_memory() if self._pins else host

    def _block_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameters in self._parameters.values() for parameter in parameters)


def _new_head(model: nn.Module) -> Iterator[nn.Parameter]:
    """What is trained whole beside the last block's adapter, in place of what all blocks read."""
    for name, parameter in model.named_parameters():
        replaced, whole, _ = name.partition("modules_to_save.")
        if whole and model.block_of_parameter(replaced) is None:
            yield parameter
