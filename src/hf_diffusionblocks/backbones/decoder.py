"""What decoders of text have in common, whose layers noise levels can modulate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ..cache_name import CACHE
from .base import PiecewiseBackbone
from .modulation import Modulation


class Decoder(PiecewiseBackbone):
    """A pre-norm decoder: norm, self-attention, residual; norm, MLP, residual."""

    attention_norm_name: ClassVar[str]  #: names of a layer's parts
    attention_name: ClassVar[str]
    mlp_norm_name: ClassVar[str]
    mlp_name: ClassVar[str] = "mlp"
    final_norm_path: ClassVar[str]

    def __init__(self, plain_class: type[PreTrainedModel], head_name: str = "lm_head"):
        super().__init__(plain_class)
        self.head_name = head_name

    def check_modulation(self, config: PreTrainedConfig) -> None:
        """All can be."""

    @abstractmethod
    def embed(
        self,
        plain: nn.Module,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens `[N, S]` (or their embeddings) at positions `[N or 1, S]` -> `[N, S, D]`."""

    def enter(
        self, plain: nn.Module, embedded: torch.Tensor, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the prelude makes of embedded clean tokens `[N, S, D]`, if there are layers that these alone run through, before
        those that are cut into blocks; and what enters the first of these. `run` runs a layer."""
        return embedded, embedded

    def embed_noisy(
        self, plain: nn.Module, embeds: torch.Tensor, position_ids: torch.Tensor, prelude_output: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Noisy tokens `[N, Q, D]`, as they enter the first layer.

        Args:
            position_ids: `[N or 1, Q]`, of the token that each becomes.
            prelude_output: `[N, S, D]`, what the prelude made of the clean tokens.
            kept: `[Q]`, which of the S is the one before each.
        """
        return self.embed(plain, inputs_embeds=embeds, position_ids=position_ids)

    @abstractmethod
    def positions(self, plain: PreTrainedModel, hidden: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
        """What the attention module takes to know positions."""

    @abstractmethod
    def keys_and_values(
        self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values `[N, heads, S, head width]` a layer computes, and nothing else of it."""

    def causal_mask(
        self,
        plain: PreTrainedModel,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values,
        explicit: bool = False,
    ) -> torch.Tensor | None:
        """HF's own causal mask for its attention implementation; None, unless `explicit`, where that needs none.

        Args:
            position_ids: those that the caller gave, which may restart and so mark packed texts, or None.
        """
        # Transformers may look if a mask hides anything, to leave it out where not: a training step would wait for an
        # accelerator to say so.
        may_look = attention_mask is None or attention_mask.device.type == "cpu" or not plain.training
        return create_causal_mask(
            config=plain.config, inputs_embeds=hidden, attention_mask=attention_mask, **{CACHE: past_key_values},
            position_ids=position_ids, allow_is_causal_skip=not explicit and may_look,
        )  # fmt: skip

    def normed(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None) -> torch.Tensor:
        """What enters a layer's attention."""
        normed = getattr(layer, self.attention_norm_name)(hidden)
        if modulation is None:
            return normed
        return torch.addcmul(modulation.attention_shift, normed, modulation.attention_scale)

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **attention) -> torch.Tensor:
        attend, mlp = getattr(layer, self.attention_name), getattr(layer, self.mlp_name)
        attended = attend(self.normed(layer, hidden, modulation), **attention)[0]
        if modulation is None:
            hidden = hidden + attended
            return hidden + mlp(getattr(layer, self.mlp_norm_name)(hidden))
        hidden = torch.addcmul(hidden, modulation.attention_gate, attended)
        normed = getattr(layer, self.mlp_norm_name)(hidden)
        normed = torch.addcmul(modulation.mlp_shift, normed, modulation.mlp_scale)
        return torch.addcmul(hidden, modulation.mlp_gate, mlp(normed))

    def read_out(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., D]` -> `[..., V]`."""
        return plain.get_submodule(self.head_name)(plain.get_submodule(self.final_norm_path)(hidden))
