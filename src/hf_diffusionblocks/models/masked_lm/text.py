"""A partly masked text as the model takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class MaskedText(NamedTuple):
    """z: tokens, some of them MASK."""

    input_ids: torch.Tensor  #: `[N, S]`
    attention_mask: torch.Tensor | None = None  #: `[N, S]`, 0 for padding
    position_ids: torch.Tensor | None = None  #: `[N or 1, S]`
    token_type_ids: torch.Tensor | None = None  #: `[N, S]`; architectures without them do not look at them

    @property
    def attended(self) -> torch.Tensor:
        """Which tokens are no padding: bool, `[N, S]`."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    def holds(self, mask_token_id: int) -> torch.Tensor:
        """Which tokens are MASK: bool, `[N, S]`."""
        return (self.input_ids == mask_token_id) & self.attended

    def masked(self, where: torch.Tensor, mask_token_id: int) -> MaskedText:
        """The same text, with these tokens (bool, `[N, S]`) masked, too."""
        return self._replace(input_ids=self.input_ids.masked_fill(where, mask_token_id))

    def rows(self, chosen: torch.Tensor) -> MaskedText:
        """Some of the texts, by number."""
        num_rows = len(self.input_ids)
        return MaskedText(*(of if of is None or len(of) < num_rows else of[chosen] for of in self))
