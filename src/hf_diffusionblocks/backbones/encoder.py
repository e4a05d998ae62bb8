"""What encoders of text have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .base import Backbone


class Encoder(Backbone):
    """A stack of stock layers that run whole: nothing modulates them."""

    embeds_token_types: ClassVar[bool] = False  #: whether `embed` takes `token_type_ids`

    def num_logits(self, config: PreTrainedConfig) -> int:
        return config.vocab_size

    @abstractmethod
    def embed(self, plain: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, S]` at positions `[N or 1, S]` -> `[N, S, D]`."""

    @abstractmethod
    def attention_both_ways(
        self, plain: PreTrainedModel, hidden: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> dict[str, Any]:
        """What a layer takes to let each token see all; padding (0 in `attention_mask`, `[N, S]`) is seen by none."""

    def final_norm(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the stock model does after its last layer and before its head: nothing, unless an architecture says so."""
        return hidden

    @abstractmethod
    def head(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., D]`, normalised -> `[..., V]`."""

    def read_out(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., D]` -> `[..., V]`."""
        return self.head(plain, self.final_norm(plain, hidden))

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: None, **attention) -> torch.Tensor:
        return layer(hidden, **attention)
