"""Inactive blocks in host memory: what is on the device while blocks take turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class OffloadedBlocks:
    """Keeps blocks in host memory, and copies to the device what is needed there, and no more.

    That is the active block, whose optimizer state is copied while it runs; the parameters of the next one, copied ahead
    then; and those of other blocks that run (earlier ones of carried context, later ones for the final loss, all in
    evaluation and inference), one at a time. What no block owns, or all read, stays on the device.

    The copy is a copy even where "the device" is the CPU, which is what makes this testable without another.

    Args:
        model: whose blocks; its parameters move at once.
        device: where blocks run.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self._optimizer: torch.optim.Optimizer | None = None
        self._waits = None  # the optimizer's hook
        stays = set(_new_head(model))
        self._parameters = {
            block: [p for p in model.block_parameters(block) if p not in stays] for block in model.resident_blocks
        }
        self._stream = torch.Stream(device) if device.type != "cpu" else None
        self.copied = {"to_device": 0, "to_host": 0}  #: bytes, of blocks' parameters and state, so far
        self._active: int | None = None
        self._next: int | None = None
        self._on_device: set[int] = set()
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
        """Whose state moves with a block, and which waits for it."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        if self._waits is not None:
            self._waits.remove()
        stock = getattr(optimizer, "optimizer", optimizer)  # of Accelerate's wrapper
        self._waits = stock.register_step_pre_hook(lambda *_: self._wait())

    def activate(self, block: int | None, following: int | None = None) -> None:
        """Make a block the one that trains (None: none does), and start to copy the one that follows."""
        self._wait()
        for other in self._on_device - {block}:
            self._evict(other)
        self._active, self._next = block, following
        if block is not None:
            self._load(block, ahead=False)
            self._load_state(block)
        if following is not None:
            self._load(following, ahead=True)

    def use(self, block: int, following: int | None = None) -> None:
        """Have a block's parameters on the device, for a forward pass, and start to copy those of the one that runs next."""
        if block == self._next:
            self._wait()
        if block not in self._on_device or following is not None:
            for other in self._on_device - {self._active, self._next, block}:
                self._evict(other)
        self._load(block, ahead=False)
        if following is not None:
            self._next = following
            self._load(following, ahead=True)

    @contextmanager
    def all_away(self) -> Iterator[None]:
        """Have all blocks in host memory, to be written there; afterwards those that train are on the device again."""
        active, following = self._active, self._next
        self.activate(None)
        if self._stream is not None:  # copies from host memory may be under way, or queued
            torch.accelerator.synchronize(self.device)
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

    def _load(self, block: int, ahead: bool) -> None:
        if block in self._on_device:
            return
        for parameter in self._parameters[block]:
            self._host[parameter] = parameter.data
            parameter.data = self._copy(parameter.data, ahead)
        self._on_device.add(block)

    def _load_state(self, block: int) -> None:
        if block in self._with_state:
            return
        for parameter in self._parameters[block]:
            self._host_states[parameter] = self._states(parameter)
            for name, value in self._states(parameter).items():
                self.optimizer.state[parameter][name] = self._copy(value, ahead=True)
        self._with_state.add(block)

    def _evict(self, block: int) -> None:
        changed = block == self._active
        for parameter in self._parameters[block]:
            host = self._host.pop(parameter)
            parameter.data = self._returned(host, parameter.data) if changed else host
            if block not in self._with_state:
                continue
            host_states = self._host_states.pop(parameter)
            for name, value in self._states(parameter).items():
                if name not in host_states:  # the block's first update has made it
                    host_states[name] = self._pinned(torch.empty_like(value, device="cpu"))
                host = host_states[name]
                self.optimizer.state[parameter][name] = self._returned(host, value) if changed else host
        self._on_device.remove(block)
        self._with_state.discard(block)

    def _states(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of a parameter and wants beside it. (Counts of steps stay on the host, mostly.)"""
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        counts_too = self.optimizer is not None and any(
            group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups
        )
        return {name: value for name, value in state.items() if torch.is_tensor(value) and (value.dim() or counts_too)}

    def _returned(self, host: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.copied["to_host"] += value.nbytes
        return host.copy_(value)

    def _copy(self, host: torch.Tensor, ahead: bool) -> torch.Tensor:
        self.copied["to_device"] += host.nbytes
        if not ahead or self._stream is None:
            return host.to(self.device, non_blocking=True, copy=True)
        # Room is made on the stream that computes, so that what leaves it can be used again at once.
        arriving = torch.empty_like(host, device=self.device)
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self._stream:
            return arriving.copy_(host, non_blocking=True)

    def _pinned(self, host: torch.Tensor) -> torch.Tensor:
        return host.pin_memory() if self.device.type == "cuda" else host

    def _wait(self) -> None:
        """Until what was copied ahead is there."""
        if self._stream is not None:
            torch.accelerator.current_stream(self.device).wait_stream(self._stream)

    def _block_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameters in self._parameters.values() for parameter in parameters)


def _new_head(model: nn.Module) -> Iterator[nn.Parameter]:
    """What is trained whole beside the last block's adapter, in place of what all blocks read."""
    for name, parameter in model.named_parameters():
        replaced, whole, _ = name.partition("modules_to_save.")
        if whole and model.block_of_parameter(replaced) is None:
            yield parameter
