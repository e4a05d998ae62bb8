"""BERT."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertLayer

from .base import may_look
from .encoder import Encoder


class BertBackbone(Encoder):
    model_type = "bert"
    plain_class = BertForMaskedLM
    layers_path = "bert.encoder.layer"
    embedding_paths = ("bert.embeddings",)
    readout_paths = ("cls",)
    embeds_token_types = True

    def check(self, config: BertConfig) -> None:
        if config.is_decoder:
            raise ValueError("is_decoder=True must be False: a BERT that is cut into blocks attends both ways")

    def make_layer(self, config: BertConfig) -> BertLayer:
        return BertLayer(config)

    def embed(self, plain: nn.Module, input_ids, position_ids, token_type_ids=None) -> torch.Tensor:
        return plain.bert.embeddings(input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids)

    def attention_both_ways(self, plain, hidden, attention_mask, position_ids) -> dict:
        skip = may_look(plain, attention_mask)
        mask = create_bidirectional_mask(plain.config, hidden, attention_mask, allow_is_bidirectional_skip=skip)
        return {"attention_mask": mask}

    def head(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return plain.cls(hidden)
