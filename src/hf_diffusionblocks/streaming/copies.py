"""Copies between host memory and a device, beside what the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

#: Units whose copies may be on their way while the host goes on. Until they have come they take memory: gradients on the device,
#: and weights that are cast for the way, in host memory.
UNITS_ON_THEIR_WAY = 2


class Arrival:
    """When a gradient is in host memory. On the device it is held until the host knows: autograd sums into what nobody else
    holds, such as a gradient that goes on to another place, too."""

    def __init__(self, event: torch.Event, gradient: torch.Tensor):
        self._event = event
        self._gradient: torch.Tensor | None = gradient

    def synchronize(self) -> None:
        """The host waits."""
        self._event.synchronize()
        self._gradient = None


class Copies:
    """Makes copies in order, on a stream a direction. (On a CPU: at once.)

    What is fetched has memory of its stream's own: before each fetch, and when something is let go, that stream waits for all
    that the device was asked for so far, so what was let go by then makes room, and nobody else has to know.

    Args:
        device: where layers run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.to_device_bytes = self.to_host_bytes = 0  #: so far
        #: Called with what is copied, its copy, and whether that is in host memory: on a CPU nothing else tells.
        self.watch: Callable[[torch.Tensor, torch.Tensor, bool], None] | None = None
        beside = device.type != "cpu"
        self._inward, self._outward = (torch.Stream(device), torch.Stream(device)) if beside else (None, None)
        self._computing: set[torch.Stream] = set()  # that have used copies (a thread may have a stream of its own)
        self._on_their_way: deque[list[torch.Event | Arrival]] = deque()  # asked for while each unit was in use
        self._asked: list[torch.Event | Arrival] = []  # since this one is

    @torch.inference_mode(False)  # a copy may be used again in training
    def fetch(self, hosts: Sequence[tuple[torch.Tensor, torch.dtype]]) -> tuple[list[torch.Tensor], torch.Event | None]:
        """Copies of host tensors on the device, each in the dtype in which it crosses; and when they are there."""
        if self._inward is None:
            copies = [host.detach().to(dtype, copy=True) for host, dtype in hosts]
            self._count(hosts, copies)
            return copies, None
        self.let_go()
        with self._inward:
            copies = [self._pinned(host, dtype).to(self.device, non_blocking=True, copy=True) for host, dtype in hosts]
        self._count(hosts, copies)
        event = self._inward.record_event()
        self._asked.append(event)
        return copies, event

    def let_go(self) -> None:
        """Copies that were used so far may be let go now. (Expandable segments are given back when the stream that they were
        made for is done, whoever else computes with them.)"""
        if self._inward is not None:
            for stream in self._computing | {torch.accelerator.current_stream(self.device)}:
                self._inward.wait_stream(stream)

    def _count(self, hosts: Sequence[tuple[torch.Tensor, torch.dtype]], copies: Sequence[torch.Tensor]) -> None:
        self.to_device_bytes += sum(copy.nbytes for copy in copies)
        if self.watch:
            for (host, _), copy in zip(hosts, copies):
                self.watch(host, copy, False)

    def wait_for(self, event: torch.Event | None) -> None:
        """What the device computes from here on comes after a fetch."""
        if event is not None:
            stream = torch.accelerator.current_stream(self.device)
            self._computing.add(stream)
            stream.wait_event(event)

    def send_home(self, value: torch.Tensor) -> tuple[torch.Tensor, Arrival | None]:
        """A copy of a tensor in host memory, and when it is there. `value` may be let go at once."""
        self.to_host_bytes += value.nbytes
        if self._outward is None:
            host = value.clone()
            if self.watch:
                self.watch(value, host, True)
            return host, None
        self._outward.wait_stream(torch.accelerator.current_stream(self.device))
        with self._outward:
            host = torch.empty_like(value, device="cpu", pin_memory=self.device.type == "cuda")
            host.copy_(value, non_blocking=True)
        if self.watch:
            self.watch(value, host, True)
        arrival = Arrival(self._outward.record_event(), value)
        self._asked.append(arrival)
        return host, arrival

    def next_unit(self) -> None:
        """Another unit begins. The host waits if what it asked for more than two before is still on its way: it would ask for
        ever more memory otherwise. (The device has work for two units then.)"""
        self._on_their_way.append(self._asked)
        self._asked = []
        while len(self._on_their_way) > UNITS_ON_THEIR_WAY:
            for each in self._on_their_way.popleft():
                each.synchronize()

    def _pinned(self, host: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        host = host.detach()
        if self.device.type != "cuda" or (host.dtype == dtype and host.is_pinned()):
            return host.to(dtype)
        staged = torch.empty_like(host, dtype=dtype, pin_memory=True)  # (PyTorch keeps it until the copy is made)
        return staged.copy_(host)
