"""A batch of text as the model takes it, and the rows that its logits are read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Text(NamedTuple):
    """x: clean tokens, by id or embedded."""

    input_ids: torch.Tensor | None  #: `[N, S]`
    inputs_embeds: torch.Tensor | None = None  #: `[N, S, D]`
    attention_mask: torch.Tensor | None = None  #: `[N, P + S]`, 0 for padding; or who sees whom, `[N, 1, S, P + S]`
    position_ids: torch.Tensor | None = None  #: `[N or 1, S]`
    past_key_values: Any = None  #: of the P tokens before
    block_input: torch.Tensor | None = None  #: `[N, S, D]`, what enters the block that trains, from a cache

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Text:
        """Of a batch as `forward` takes it."""
        return cls(*(batch.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")))

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

    def of_stock_model(self) -> dict[str, Any]:
        """What the stock model takes, to run and keep nothing."""
        given = {name: getattr(self, name) for name in self._fields if name != "block_input"}
        return {"use_cache": False, **{name: value for name, value in given.items() if value is not None}}

    def positioned(self) -> dict[str, torch.Tensor | None]:
        """What embeds these tokens: with their positions."""
        position_ids = self.position_ids
        if position_ids is None:
            past = 0 if self.past_key_values is None else self.past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + self.num_tokens, device=self.tokens.device)[None]
        return {"input_ids": self.input_ids, "inputs_embeds": self.inputs_embeds, "position_ids": position_ids}

    def without_last(self) -> Text:
        """All tokens but the last, which is no context of any target."""
        text = Text(*(tensor if tensor is None else tensor[:, :-1] for tensor in self))
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            text = text._replace(attention_mask=self.attention_mask[:, :, :-1, :-1])
        return text


class ReadoutInput(NamedTuple):
    """What tokens' logits are read from: of any sequences and positions, or `[N, S-1, ...]`."""

    hidden: torch.Tensor  #: `[..., D]`, what left the block
    z: torch.Tensor | None = None  #: the paper's: `[..., D]`, the noisy targets
    sigma: torch.Tensor | None = None  #: the paper's: `[...]`

    def flat(self) -> ReadoutInput:
        """`[R, ...]`."""
        return ReadoutInput(*(tensor if tensor is None else tensor.flatten(0, 1) for tensor in self))

    def where(self, chosen: torch.Tensor | slice) -> ReadoutInput:
        """Some of the rows, by number."""
        return ReadoutInput(*(tensor if tensor is None else tensor[chosen] for tensor in self))
