"""Tiny transformers of diffusers, with random weights, and what each is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tiny_models import CannotBuild, randomized, seed
from torch import Tensor, nn

ROWS, TEXT, SIDE, HEADS, HEAD, WIDTH = 2, 6, 8, 4, 16, 64
HEADS_OF = {"num_attention_heads": HEADS, "attention_head_dim": HEAD}
#: Class -> the fields of its config that are not as usual.
CONFIGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {
        **HEADS_OF, "num_layers": 4, "sample_size": SIDE, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
    },
    "FluxTransformer2DModel": {
        **HEADS_OF, "num_layers": 2, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 4, 8),
    },
    "SD3Transformer2DModel": {
        **HEADS_OF, "num_layers": 4, "sample_size": SIDE, "in_channels": 4, "out_channels": 4, "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH, "pooled_projection_dim": WIDTH, "pos_embed_max_size": SIDE,
    },
    "QwenImageTransformer2DModel": {
        **HEADS_OF, "num_layers": 4, "in_channels": 16, "out_channels": 4, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
    },
    "PixArtTransformer2DModel": {
        **HEADS_OF, "num_layers": 4, "sample_size": SIDE, "cross_attention_dim": WIDTH, "caption_channels": WIDTH,
        "norm_num_groups": 4, "use_additional_conditions": False,
    },
    "SanaTransformer2DModel": {
        **HEADS_OF, "num_layers": 4, "sample_size": SIDE, "in_channels": 4, "out_channels": 4,
        "num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD, "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
    },
    "WanTransformer3DModel": {
        **HEADS_OF, "num_layers": 4, "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": WIDTH,
        "rope_max_seq_len": 32,
    },
    "AuraFlowTransformer2DModel": {
        **HEADS_OF, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "sample_size": SIDE, "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH, "pos_embed_max_size": 64,
    },
    "ZImageTransformer2DModel": {
        "dim": WIDTH, "n_layers": 4, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS, "in_channels": 4,
        "cap_feat_dim": WIDTH, "axes_dims": [4, 4, 8], "axes_lens": [128, 32, 32],
    },
    "Lumina2Transformer2DModel": {
        "hidden_size": WIDTH, "num_layers": 4, "num_refiner_layers": 1, "num_attention_heads": HEADS, "num_kv_heads": 2,
        "sample_size": SIDE, "in_channels": 4, "multiple_of": 32, "cap_feat_dim": WIDTH, "axes_dim_rope": (4, 4, 8),
        "axes_lens": (64, 32, 32),
    },
    "CogVideoXTransformer3DModel": {
        **HEADS_OF, "num_layers": 4, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": WIDTH,
        "sample_width": SIDE, "sample_height": SIDE, "sample_frames": 5, "max_text_seq_length": TEXT,
    },
    "LTXVideoTransformer3DModel": {
        **HEADS_OF, "num_layers": 4, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
    },
}  # fmt: skip
NAMES = tuple(CONFIGS)


def diffusers_model(name: str) -> nn.Module:
    """In training mode, float32, every parameter random.

    Raises:
        CannotBuild: where diffusers refuses.
    """
    try:
        seed(0)
        return randomized(getattr(diffusers, name)(**CONFIGS[name])).train()
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


def diffusers_batch(name: str) -> dict[str, Any]:
    """What the model is called with; the same at each call."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = {"encoder_hidden_states": draw(ROWS, TEXT, WIDTH)}
    image = {"hidden_states": draw(ROWS, 4, SIDE, SIDE), "timestep": torch.tensor([3, 7])}
    return _batches(draw, image, text)[name]()


def _batches(draw: Callable, image: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Callable[[], dict[str, Any]]]:
    some = torch.tensor([0.3, 0.7])
    everywhere = torch.ones(ROWS, TEXT, dtype=torch.bool)
    pooled = {"pooled_projections": draw(ROWS, WIDTH)}
    tokens = {"hidden_states": draw(ROWS, 16, 16), "timestep": some}
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1)
    return {
        "DiTTransformer2DModel": lambda: {**image, "class_labels": torch.tensor([1, 2])},
        "FluxTransformer2DModel": lambda: {**tokens, **text, **pooled, "img_ids": places, "txt_ids": torch.zeros(TEXT, 3)},
        "SD3Transformer2DModel": lambda: {**image, **text, **pooled},
        "QwenImageTransformer2DModel": lambda: {
            **tokens, **text, "encoder_hidden_states_mask": everywhere, "img_shapes": [[(1, 4, 4)]] * ROWS,
        },
        "PixArtTransformer2DModel": lambda: {
            **image, **text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "SanaTransformer2DModel": lambda: {**image, **text},
        "WanTransformer3DModel": lambda: {**image, **text, "hidden_states": draw(ROWS, 4, 2, SIDE, SIDE)},
        "AuraFlowTransformer2DModel": lambda: {**image, **text, "timestep": some},
        "ZImageTransformer2DModel": lambda: {
            "x": [draw(4, 1, SIDE, SIDE) for _ in range(ROWS)], "t": some,
            "cap_feats": [draw(TEXT, WIDTH) for _ in range(ROWS)],
        },
        "Lumina2Transformer2DModel": lambda: {**image, **text, "timestep": some, "encoder_attention_mask": everywhere},
        "CogVideoXTransformer3DModel": lambda: {**image, **text, "hidden_states": draw(ROWS, 2, 4, SIDE, SIDE)},
        "LTXVideoTransformer3DModel": lambda: {
            **text, "hidden_states": draw(ROWS, 16, 8), "timestep": torch.tensor([3, 7]), "encoder_attention_mask": everywhere,
            "num_frames": 1, "height": 4, "width": 4,
        },
    }  # fmt: skip
