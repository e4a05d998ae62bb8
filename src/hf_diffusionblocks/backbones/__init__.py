"""The architectures that can be converted."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .base import Backbone, Parts
from .decoder import CausalBackbone
from .gpt2 import GPT2Backbone
from .llama import LlamaBackbone
from .qwen3 import Qwen3Backbone
from .vit import ViTBackbone

#: `model_type` of a plain config -> its backbone.
BACKBONES: dict[str, Backbone] = {
    backbone.model_type: backbone for backbone in (GPT2Backbone(), LlamaBackbone(), Qwen3Backbone(), ViTBackbone())
}


def backbone_for(config: PreTrainedConfig) -> Backbone:
    """The backbone of a plain model's config.

    Raises:
        ValueError: the architecture is not supported (lists those that are), or not with this config.
    """
    if config.model_type not in BACKBONES:
        supported = ", ".join(f"{b.model_type} ({b.plain_class.__name__})" for b in BACKBONES.values())
        raise ValueError(f"model_type={config.model_type!r} is not supported; supported: {supported}")
    backbone = BACKBONES[config.model_type]
    backbone.check(config)
    return backbone


__all__ = ["BACKBONES", "Backbone", "CausalBackbone", "Parts", "backbone_for"]
