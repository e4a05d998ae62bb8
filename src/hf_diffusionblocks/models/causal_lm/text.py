"""A batch of text as the model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Text(NamedTuple):
    """x: clean tokens, by id or embedded."""

    input_ids: torch.Tensor | None = None  #: `[N, S]`
    inputs_embeds: torch.Tensor | None = None  #: `[N, S, D]`
    attention_mask: torch.Tensor | None = None  #: `[N, P + S]`, 0 for padding; or who sees whom, `[N, 1, S, P + S]`
    position_ids: torch.Tensor | None = None  #: `[N or 1, S]`
    past_key_values: Any = None  #: of the P tokens before

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Text:
        """Of a batch as `forward` takes it."""
        return cls(*map(batch.get, cls._fields))

    @property
    def tokens(self) -> torch.Tensor:
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.tokens.shape[1]

    def shape_in(self, dtype: torch.dtype) -> torch.Tensor:
        """Hidden states of no width, for their shape, dtype and device."""
        return torch.empty((*self.tokens.shape[:2], 0), dtype=dtype, device=self.tokens.device)

    def positioned(self) -> dict[str, torch.Tensor | None]:
        """What embeds these tokens: with their positions."""
        position_ids, tokens = self.position_ids, self.tokens
        if position_ids is None:
            past = 0 if self.past_key_values is None else self.past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        return {"input_ids": self.input_ids, "inputs_embeds": self.inputs_embeds, "position_ids": position_ids}

    def without_last(self) -> Text:
        """All tokens but the last, which is no context of any target."""
        text = Text(*[each if each is None else each[:, :-1] for each in self])
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            text = text._replace(attention_mask=self.attention_mask[:, :, :-1, :-1])
        return text
