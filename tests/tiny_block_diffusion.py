"""A tiny DiffusionGemma."""

from __future__ import annotations

from transformers import DiffusionGemmaConfig


def block_diffusion_config(vocab_size: int, canvas_length: int) -> DiffusionGemmaConfig:
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_experts": 2,
        "top_k_experts": 1, "moe_intermediate_size": 32, "max_position_embeddings": 1024, "initializer_range": 0.2,
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "patch_size": 4,
    }  # fmt: skip
    tokens = {"image_token_id": vocab_size - 1, "boi_token_id": vocab_size - 2, "eoi_token_id": vocab_size - 3}
    return DiffusionGemmaConfig(text_config=sizes, vision_config=vision, canvas_length=canvas_length, **tokens)
