"""What some architectures want otherwise than the generic shrinking of their config makes it."""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
#: By model type. A dictionary for a config inside is a table of its fields.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"num_heads": [2, 2, 4, 4], "embed_dim": 16, "window_size": 2, "image_size": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    "esm": {"vocab_size": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_vision": {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hgnet_v2": {"stem_channels": [3, 8, 12]},
    "hiera": {"image_size": [64, 64], "embed_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "mobilevitv2": {"image_size": 64},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 127},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 3, "max_position_embeddings": 16,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "image_size": 8,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 4], "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh", "local", "lsh"], "num_buckets": 4,
        "hash_seed": 0,  # else it draws anew at each call
    },
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 20, "no_token_index": 21},
    "swin": {"num_heads": [2, 2, 4, 4], "embed_dim": 16, "window_size": 2, "image_size": 64},
    "swinv2": {"num_heads": [2, 2, 4, 4], "embed_dim": 16, "window_size": 2, "image_size": 64},
    "textnet": {"stem_out_channels": 16, "image_size": [64, 64]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}  # fmt: skip
