"""The architectures that can be converted."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .base import Backbone
from .vit import ViTBackbone

#: `model_type` of a plain config -> its backbone.
BACKBONES: dict[str, Backbone] = {backbone.model_type: backbone for backbone in (ViTBackbone(),)}


def backbone_for(config: PreTrainedConfig) -> Backbone:
    """The backbone of a plain model's config.

    Raises:
        ValueError: the architecture is not supported; lists those that are.
    """
    if config.model_type not in BACKBONES:
        supported = ", ".join(f"{b.model_type} ({b.plain_class.__name__})" for b in BACKBONES.values())
        raise ValueError(f"model_type={config.model_type!r} is not supported; supported: {supported}")
    return BACKBONES[config.model_type]


__all__ = ["BACKBONES", "Backbone", "backbone_for"]
