"""Copies between a device and host memory, beside what the device computes."""

from __future__ import annotations

import torch


class CopyStream:
    """Makes copies one after another, while the device computes and the host goes on. (On a CPU: at once.)

    What a copy reads, it reads as it is when all that was asked of the device before is done. What it writes is there for the
    device after `join`, for the host after `settle`, and for later copies always.

    Args:
        device: on one side.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.Stream(device) if device.type != "cpu" else None

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A copy of a (pinned) tensor on the device."""
        if self._stream is None:
            return host.to(self._device, copy=True)
        self._follow()
        with self._stream:  # its memory is this stream's: what has left before makes room for what comes, and no one waits
            return host.to(self._device, non_blocking=True, copy=True)

    def to_host(self, value: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
        """Overwrite a (pinned) tensor; gives it back. `value` may be let go at once."""
        if self._stream is None:
            return host.copy_(value)
        self._follow()
        with self._stream:
            host.copy_(value, non_blocking=True)
        value.record_stream(self._stream)  # memory of the stream that computes is not used again before
        return host

    def join(self) -> None:
        """What the device computes from here on comes after all copies so far."""
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_stream(self._stream)

    def settle(self) -> None:
        """Have the host wait for all copies so far."""
        if self._stream is not None:
            self._stream.synchronize()

    def _follow(self) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
