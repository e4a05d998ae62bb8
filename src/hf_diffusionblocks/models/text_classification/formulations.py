"""The paper's classes, of texts that a decoder reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..block import Block
from ..noisy_label import NoisyLabel
from ..positions import positions_of


class NoisyLabelAfterText(NoisyLabel):
    """The sequence is [tokens, noisy label]: the label is the last token, sees the text and itself, and is read out."""

    def enter(self, block: Block, x: Mapping) -> torch.Tensor:
        self.model.refuse({"token_type_ids": x.get("token_type_ids")}, "with preset='paper': these decoders have none")
        tokens = {name: x.get(name) for name in ("input_ids", "inputs_embeds")}
        return block.embed({**tokens, "position_ids": _positions(x)[:, :-1]})

    def attention(self, x: Mapping, hidden: torch.Tensor) -> dict[str, Any]:
        plain, architecture, mask = self.model.backbone, self.model.architecture, x.get("attention_mask")
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        return {
            "attention_mask": architecture.causal_mask(plain, hidden, mask, None, None),
            **architecture.positions(plain, hidden, _positions(x)),
        }

    def read_out(self, block: Block, leaving: torch.Tensor) -> torch.Tensor:
        return block.read_out(leaving[:, -1])


def _positions(x: Mapping) -> torch.Tensor:
    """Of tokens and label, `[N or 1, S+1]`: the label stands after the last token that is no padding."""
    positions, mask = x.get("position_ids"), x.get("attention_mask")
    if positions is None and mask is not None:
        positions = positions_of(mask)
    elif positions is None:
        tokens = next(iter(x.values()))
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return torch.cat([positions, positions.amax(-1, keepdim=True) + 1], -1)
