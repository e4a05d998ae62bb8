"""ModernBERT: BERT with rotary positions, and layers of two kinds: some see all tokens, most their neighbours alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer

from .base import may_look
from .decoder import layer_beyond_the_last
from .encoder import Encoder

MASKS = {"full_attention": create_bidirectional_mask, "sliding_attention": create_bidirectional_sliding_window_mask}


class ModernBertBackbone(Encoder):
    model_type = "modernbert"
    plain_class = ModernBertForMaskedLM
    layers_path = "model.layers"
    embedding_paths = ("model.embeddings",)
    readout_paths = ("model.final_norm", "head", "decoder")

    def make_layer(self, config: ModernBertConfig) -> ModernBertEncoderLayer:
        return ModernBertEncoderLayer(config, layer_idx=layer_beyond_the_last(config))

    def embed(self, plain: nn.Module, input_ids, position_ids) -> torch.Tensor:
        return plain.model.embeddings(input_ids=input_ids)  # (positions are the attention's)

    def attention_both_ways(self, plain, hidden, attention_mask, position_ids) -> dict:
        """By the kind of layer."""
        kinds = set(plain.config.layer_types)
        rotary, skip = plain.model.rotary_emb, may_look(plain, attention_mask)
        masks = {
            kind: MASKS[kind](plain.config, hidden, attention_mask, allow_is_bidirectional_skip=skip) for kind in kinds
        }
        return {
            "attention_mask": masks,
            "position_embeddings": {kind: rotary(hidden, position_ids, kind) for kind in kinds},
        }

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: None, **attention) -> torch.Tensor:
        of_kind = {name: values[layer.attention_type] for name, values in attention.items()}
        return super().run_layer(layer, hidden, modulation, **of_kind)

    def final_norm(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return plain.model.final_norm(hidden)

    def head(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return plain.decoder(plain.head(hidden))
