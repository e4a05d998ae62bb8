"""ViT for image classification."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from .modulation import Modulation
from .base import PiecewiseBackbone


class ViTBackbone(PiecewiseBackbone):
    def check_modulation(self, config: ViTConfig) -> None:
        """All can be."""

    def embed(
        self,
        plain: ViTForImageClassification,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """`[N, C, H, W]` -> `[N, 1 + patches, D]`, CLS first."""
        dtype = plain.vit.embeddings.patch_embeddings.projection.weight.dtype
        return plain.vit.embeddings(pixel_values.to(dtype), interpolate_pos_encoding=interpolate_pos_encoding)

    def run_layer(self, layer: ViTLayer, hidden: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        normed = torch.addcmul(modulation.attention_shift, layer.layernorm_before(hidden), modulation.attention_scale)
        hidden = modulation.attention_gate * layer.dropout(layer.attention(normed)[0]) + hidden
        normed = torch.addcmul(modulation.mlp_shift, layer.layernorm_after(hidden), modulation.mlp_scale)
        return modulation.mlp_gate * layer.dropout(layer.mlp(normed)) + hidden

    def read_out(self, plain: ViTForImageClassification, hidden: torch.Tensor) -> torch.Tensor:
        """`[N, S, D]` -> `[N, num_labels]`, from the CLS token."""
        return plain.classifier(plain.vit.layernorm(hidden)[:, 0, :])
