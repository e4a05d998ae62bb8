"""Where tokens stand in texts that are padded."""

from __future__ import annotations

import torch


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[N, S]`, 0 for padding, to positions `[N, S]`, counted from the first token that is none; as `generate` counts."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
