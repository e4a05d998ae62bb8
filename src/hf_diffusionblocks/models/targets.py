"""Discrete targets as points that can be noised."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FixedTargets(nn.Module):
    """A table of target vectors that is never trained: what a loss is measured against does not move with it, and blocks
    trained apart aim at the same points. (Tokens' targets are input embeddings, which their other role trains.)"""

    SUFFIX = "_embeddings.table"  #: how its name ends in a state dict: it is saved, and no parameter

    def __init__(self, num_targets: int, width: int):
        super().__init__()
        self.register_buffer("table", torch.randn(num_targets, width))

    def vectors(self) -> torch.Tensor:
        """All targets e_v, `[V, D]` float32 of norm 1."""
        return F.normalize(self.table.float(), dim=-1)

    def resize(self, num_targets: int) -> None:
        """Keep the first targets, and draw further ones as fresh ones are."""
        width = self.table.shape[-1]
        further = torch.randn(max(num_targets - len(self.table), 0), width) * width**-0.5
        self.table = torch.cat([self.table[:num_targets], further.to(self.table)])
