"""Copies between a device and host memory that come as late as they may."""

from __future__ import annotations

from collections.abc import Callable

import torch


class LateCopies:
    """A [`CopyStream`] as slow as can be: what it has copied is there when somebody waits for it, and NaN before."""

    def __init__(self, device: torch.device):
        self._queue: list[tuple[str, Callable[[], None]]] = []
        self._on_the_way: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # address of a host tensor -> it, and its new value

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        there = torch.full_like(host, torch.nan)
        self._queue.append(("to device", lambda: there.copy_(self._on_the_way.get(host.data_ptr(), (host, host))[1])))
        return there

    def to_host(self, value: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
        copied = host, value.clone()
        host.fill_(torch.nan)
        self._queue.append(("to host", lambda: self._on_the_way.update({host.data_ptr(): copied})))
        return host

    @property
    def under_way(self) -> set[str]:
        return {way for way, _ in self._queue}

    def join(self) -> None:
        for _, copy in self._queue:
            copy()
        self._queue.clear()

    def settle(self) -> None:
        self.join()
        for host, value in self._on_the_way.values():
            host.copy_(value)
        self._on_the_way.clear()
