"""Discrete targets as points that can be noised."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TargetEmbedding(nn.Embedding):
    """A table of target vectors, L2-normalised on use: without that, training can shrink them all to zero noise."""

    def vectors(self) -> torch.Tensor:
        """All targets e_v, `[V, D]` float32 of norm 1."""
        return F.normalize(self.weight.float(), dim=-1)
