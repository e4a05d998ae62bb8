"""Tiny models of every architecture of transformers' mappings, with random weights, from their own config classes.

A config's fields are shrunk by name, configs inside it as well; what an architecture wants otherwise stands in `EXCEPTIONS`.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import numpy as np
import torch
import transformers
from tiny_exceptions import EXCEPTIONS
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "masked-lm": "MASKED_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
}
VOCABULARY, LAYERS, WIDTH, HEADS, IMAGE, NUM_LABELS = 128, 4, 64, 4, 32, 3
POSITIONS = 64
#: Fields of configs, by regular expressions of the whole name, and what they become. The first that fits counts.
SIZES = {
    r"(src_|tgt_|audio_|entity_|pronunciation_|shape_|char_)?vocab_size(_per_layer_input|s)?": VOCABULARY,
    r"(num_hidden_|num_|n_|encoder_|decoder_|num_encoder_|num_decoder_|conf_num_hidden_|[lxr]_)?layers?": LAYERS,
    r"depth": 2,
    r"(d_|vision_|text_|audio_|backbone_|decoder_)?(hidden_size|hidden_size_global|model|embed_dim|embed)": WIDTH,
    r"(input_|output_|entity_)?(embedding_size|emb_dim|emb_size|n_embd|dim|hidden_dim|embed_dim|width)": WIDTH,
    r"(out_|downsample_|prediction_head_)(hidden_size|size)|(pronunciation|shape)_embed_dim": WIDTH,
    r"(.*_)?(intermediate_size|ffn_hidden_size|ffn_dim|d_ff|d_inner|n_inner|intermediate_size_mlp|mlp_dim)": WIDTH,
    r"dim_ff|feed_forward_size": WIDTH,
    r"(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_|conf_num_|swa_num_)?(attention_heads?|heads?)": HEADS,
    r"(swa_)?(num_key_value_heads|num_kv_heads)": 2,
    r"(swa_|global_|index_|d_|dim_)?(head_dim|d_kv|d_head|kv_channels|attention_head_size|dim_head)": WIDTH // HEADS,
    r"linear_((key|value)_)?head_dim": WIDTH // HEADS,
    r"linear_num_key_heads": 2,
    r"linear_num_(value_)?heads": HEADS,
    r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|prompt_length)": POSITIONS,
    r"max_(source|target|encoder_position|decoder_position)_(positions|embeddings)": POSITIONS,
    r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|zero_expert_num)": 4,
    r"(num_experts_per_tok|moe_topk|moe_k|moe_top_k|top_k_experts)": 2,
    r"(n_group|topk_group)": 1,
    r"first_k_dense_replace": 1,
    r"(kv_lora_rank|q_lora_rank|v_head_dim|o_lora_rank|qk_head_dim)": WIDTH // HEADS,
    r"(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)": 8,
    r"index_n_heads": HEADS,
    r"(index_topk|index_topk_blocks)": 4,
    r"(sliding_window|sliding_window_size|attention_window_size|local_attention)": 8,
    r"(mamba_)?(d_state|state_size|ssm_state_size)": 8,
    r"(mamba_)?(chunk_size)": 8,
    r"mamba_(n_heads|num_heads)": 8,
    r"mamba_(d_head|head_dim)": 16,
    r"mamba_d_ssm": 2 * WIDTH,
    r"image_size": IMAGE,
    r"projection_dim|bottleneck_size|intra_bottleneck_size": WIDTH,
    r"laurel_rank|hidden_size_per_layer_input": 8,
    r"query_pre_attn_scalar": 16,
    r"position_embedding_size": 64,
    r"(depths|num_block_repeats|stage_num_blocks|layer_depths)": [1],
}  # fmt: skip
#: Lists of widths are scaled down by this.
WIDTH_LISTS = re.compile("hidden_sizes|embed_dims|embed_dim|neck_hidden_sizes|stage_(in|mid|out)_channels|hidden_size")
SCALE = 4
DROPOUT = re.compile(r".*(drop|pdrop).*|.*jitter.*|mask_(time|feature)_prob|.*noise.*")


class CannotBuild(Exception):
    """An architecture that has no tiny model here; the message says why."""


def names_of(mapping: str) -> list[str]:
    """Architectures of a mapping: transformers' model types."""
    return list(getattr(modeling_auto, f"MODEL_FOR_{MAPPINGS[mapping]}_MAPPING_NAMES"))


def model_class(mapping: str, name: str) -> type[nn.Module]:
    found = getattr(modeling_auto, f"MODEL_FOR_{MAPPINGS[mapping]}_MAPPING_NAMES")[name]
    return getattr(transformers, found if isinstance(found, str) else found[0])


def tiny_model(mapping: str, name: str, dropout: bool = False) -> nn.Module:
    """A model in training mode, float32, every parameter random.

    Raises:
        CannotBuild: where config or model do not come to be.
    """
    try:
        kind = model_class(mapping, name)
        config = tiny_config(_config_class(kind, name), dropout=dropout)
        _for_task(config, mapping)
        seed(0)
        model = kind(config).float()
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}") from error
    return randomized(model, dropout).train()


def randomized(model: nn.Module, dropout: bool = False) -> nn.Module:
    """Nothing passes by being zero or one; and dropout off, unless it is asked for."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # (Youtu's is when it is loaded)
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
    return model


def seed(number: int) -> None:
    """All random numbers that models draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


# ---- configs


def tiny_config(kind: type[PreTrainedConfig], dropout: bool = False, **more) -> PreTrainedConfig:
    """The config of this class with small sizes, configs inside it as well; `more` are fields as they are."""
    own = {**EXCEPTIONS.get(kind.model_type, {}), **more}
    fields = {}
    for field in dataclasses.fields(kind):
        value = _tiny(field.name, _default(field), dropout)
        if value is not None:
            fields[field.name] = value
    usual = {field.name: field.default for field in dataclasses.fields(kind)}
    if "num_key_value_heads" in fields and usual["num_key_value_heads"] == usual.get("num_attention_heads"):
        fields["num_key_value_heads"] = HEADS  # some architectures take no other
    fields.update({name: tiny_config(sub, dropout) for name, sub in _inner_configs(kind, own)})
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(fields.get(name), PreTrainedConfig):
            value = tiny_config(type(fields[name]), dropout, **value)
        fields[name] = value
    return kind(**fields)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _tiny(name: str, value: Any, dropout: bool) -> Any:
    """What a field becomes; None leaves it alone."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return None
    if DROPOUT.fullmatch(name) and isinstance(value, (int, float)):
        return None if dropout else type(value)(0)
    if isinstance(value, int) and re.fullmatch(r".*_(token_id|token_index|index|id)", name) and value >= VOCABULARY - 20:
        return VOCABULARY - 1 - sum(map(ord, name)) % 17  # at the end of the vocabulary; most differ
    if isinstance(value, (list, tuple)):
        return _tiny_list(name, list(value))
    for pattern, size in SIZES.items():
        if isinstance(value, int) and not isinstance(size, list) and re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else None
    return None


def _tiny_list(name: str, values: list) -> list | None:
    if not values or not all(isinstance(value, int) for value in values):
        return None
    if any(isinstance(size, list) and re.fullmatch(pattern, name) for pattern, size in SIZES.items()):
        return [1] * len(values)
    if WIDTH_LISTS.fullmatch(name):
        return [max(value // SCALE, 8) for value in values]
    return None


def _inner_configs(kind: type[PreTrainedConfig], own: dict) -> list[tuple[str, type[PreTrainedConfig]]]:
    """Name and class of each config inside; where the class is left open (AutoConfig), the one that it is by default."""
    found = []
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        if name in own and not isinstance(own[name], dict):
            continue
        usual = (getattr(kind, "sub_configs_defaults", None) or {}).get(name)
        if sub is AutoConfig:
            sub = CONFIG_MAPPING[usual.model_type] if getattr(usual, "model_type", None) else None
        if sub is not None:
            found.append((name, sub))
    return found


def _config_class(kind: type, name: str) -> type[PreTrainedConfig]:
    """The architecture's own; or the model's, where that wants a part of it (the text of a composite)."""
    own = CONFIG_MAPPING[name]
    return own if kind.config_class is None or issubclass(own, kind.config_class) else kind.config_class


def _for_task(config: PreTrainedConfig, mapping: str) -> None:
    """What a task wants of the config that is built already."""
    for part in {id(part): part for part in (config, _text(config))}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
        if part.is_encoder_decoder and getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = 0
        for field in ("is_decoder", "causal"):
            if mapping == "causal-lm" and hasattr(part, field):
                setattr(part, field, True)
        if hasattr(part, "use_cache"):
            part.use_cache = False
    if mapping.endswith("classification"):
        config.num_labels = NUM_LABELS


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text's part, and of the decoder where there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)
