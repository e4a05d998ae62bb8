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

    @property
    def positions(self) -> torch.Tensor:
        """`[N or 1, S]`, of these tokens."""
        if self.position_ids is not None:
            return self.position_ids
        past, tokens = 0 if self.past_key_values is None else self.past_key_values.get_seq_length(), self.tokens
        return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]

    def without_last(self) -> Text:
        """All tokens but the last, which is no context of any target."""
        text = Text(*[each if each is None else each[:, :-1] for each in self])
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            text = text._replace(attention_mask=self.attention_mask[:, :, :-1, :-1])
        return text
