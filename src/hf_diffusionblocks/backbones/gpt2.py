"""GPT-2."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from .modulation import Modulation
from .decoder import Decoder


class GPT2Backbone(Decoder):
    attention_norm_name, attention_name, mlp_norm_name = "ln_1", "attn", "ln_2"
    final_norm_path = "transformer.ln_f"

    def check_modulation(self, config: GPT2Config) -> None:
        if config.add_cross_attention:
            raise ValueError("add_cross_attention=True must be False: a block has no encoder to attend to")

    def embed(self, plain: nn.Module, input_ids=None, inputs_embeds=None, position_ids=None) -> torch.Tensor:
        parts = plain.transformer
        if inputs_embeds is None:
            inputs_embeds = parts.wte(input_ids)
        return parts.drop(inputs_embeds + parts.wpe(position_ids))

    def embed_noisy(
        self, plain: nn.Module, embeds: torch.Tensor, position_ids: torch.Tensor, prelude_output: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        # The token after a full context has logits, as in the plain model, though no position of its own.
        last = plain.transformer.wpe.num_embeddings - 1
        return self.embed(plain, inputs_embeds=embeds, position_ids=position_ids.clamp(max=last))

    def positions(self, plain: GPT2LMHeadModel, hidden: torch.Tensor, position_ids: torch.Tensor) -> dict:
        return {}

    def keys_and_values(self, layer: GPT2Block, hidden: torch.Tensor, modulation: Modulation | None):
        attention = layer.attn
        width = attention.split_size
        weight, bias = attention.c_attn.weight[:, width:], attention.c_attn.bias[width:]  # past the queries'
        both = F.linear(self.normed(layer, hidden, modulation), weight.T, bias)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        keys, values = both.split(width, dim=-1)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)
