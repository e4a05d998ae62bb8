"""Targets that are one of V known vectors: how logits become a point among them.

Pure functions of tensors. `N` is the batch, `V` the number of classes (or tokens), `D` the width of the target embeddings.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def soft_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The expected target under softmax(logits), `[N, D]`: the posterior mean. Shrinks where the model is unsure."""
    return logits.float().softmax(-1) @ targets.float()


def hard_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The most likely target, `[N, D]`."""
    return F.embedding(logits.argmax(-1), targets).float()
