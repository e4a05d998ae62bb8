"""What it costs in time to keep weights, gradients and optimizer state in host memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PROBED = 2**23  #: parameters that the probe's optimizer moves: more than a cache holds
PROBES = 3


@dataclass(frozen=True)
class Costs:
    """Of a micro-batch, and of the optimizer's step.

    Args:
        to_device, to_host: bytes that are copied in a micro-batch.
        trained: parameters that the optimizer moves on the host.
        operations: of floating point in a micro-batch, forward, again and backward; None: not counted.
    """

    to_device: int
    to_host: int
    trained: int
    operations: int | None = None

    def copying(self, bandwidth: float) -> float:
        """Seconds of copying a micro-batch's bytes, both ways one after the other.

        Args:
            bandwidth: bytes a second.
        """
        return (self.to_device + self.to_host) / bandwidth

    def stepping(self, dtype: torch.dtype) -> float:
        """Seconds of the optimizer's step on this host."""
        return self.trained * seconds_of_a_parameter(dtype)

    def hidden_from(self, bandwidth: float, tflops: float, batch_size: int) -> int:
        """The rows of a micro-batch from which on computing takes as long as its copies."""
        computing = self.operations / batch_size / (tflops * 1e12)  # of a row
        return max(1, -int(-self.copying(bandwidth) // computing))


@lru_cache
def seconds_of_a_parameter(dtype: torch.dtype) -> float:
    """What PyTorch's fused AdamW takes on this host's cores for one parameter, by a probe of some millions: the fastest of
    three steps."""
    parameter = torch.nn.Parameter(torch.zeros(PROBED, dtype=dtype))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()  # makes the state
    times = []
    for _ in range(PROBES):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times) / PROBED


class Operations(TorchDispatchMode):
    """Counts operations of floating point: of products of matrices, convolutions and attention, as PyTorch's counter does."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result
