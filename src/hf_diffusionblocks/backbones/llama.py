"""Llama."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .modulation import Modulation
from .decoder import Decoder


class LlamaBackbone(Decoder):
    attention_norm_name, attention_name, mlp_norm_name = "input_layernorm", "self_attn", "post_attention_layernorm"
    final_norm_path = "model.norm"

    def embed(self, plain: nn.Module, input_ids=None, inputs_embeds=None, position_ids=None) -> torch.Tensor:
        return plain.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def positions(self, plain: PreTrainedModel, hidden: torch.Tensor, position_ids: torch.Tensor) -> dict:
        return {"position_embeddings": plain.model.rotary_emb(hidden, position_ids=position_ids)}

    def keys_and_values(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, position_embeddings):
        attention, normed = layer.self_attn, self.normed(layer, hidden, modulation)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        keys = self.key_norm(attention, attention.k_proj(normed).view(shape)).transpose(1, 2)
        values = attention.v_proj(normed).view(shape).transpose(1, 2)
        return apply_rotary_pos_emb(keys, keys, *position_embeddings)[1], values

    def key_norm(self, attention: nn.Module, keys: torch.Tensor) -> torch.Tensor:
        """Some descendants of Llama normalise keys, `[N, S, heads, head width]`."""
        return keys
