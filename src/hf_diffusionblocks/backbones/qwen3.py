"""Qwen3: Llama, with queries and keys normalised."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3Config

from .llama import LlamaBackbone


class Qwen3Backbone(LlamaBackbone):
    def check_modulation(self, config: Qwen3Config) -> None:
        if "sliding_attention" in config.layer_types:
            raise ValueError(
                f"use_sliding_window={config.use_sliding_window} with max_window_layers={config.max_window_layers} must "
                "leave every layer full attention: sliding windows are not supported"
            )

    def key_norm(self, attention: nn.Module, keys: torch.Tensor) -> torch.Tensor:
        return attention.k_norm(keys)
