"""Several processes: what they tell one another.

DDP is not used: its buckets hold a gradient of every block on every rank. Here only gradients that exist are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean gradients over all processes, of those that are there."""
    pending = []
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= dist.get_world_size()
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def broadcast(tensors: Iterable[torch.Tensor], source: int) -> None:
    """Overwrite tensors by those of one rank."""
    for tensor in tensors:
        dist.broadcast(tensor.data, source)
        torch.autograd.graph.increment_version(tensor)  # by which others know that it has changed
