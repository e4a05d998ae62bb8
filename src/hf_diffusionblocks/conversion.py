"""`convert`: a plain HF model, config, hub id or folder becomes a DiffusionBlocks model."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .backbones import backbone_for
from .configuration import USER_FIELDS, DiffusionBlocksConfig
from .models import MODELS, DiffusionBlocksPreTrainedModel


def convert(
    source: PreTrainedModel | PreTrainedConfig | str | PathLike,
    num_blocks: int = 4,
    task: str | None = None,
    **config_fields,
) -> DiffusionBlocksPreTrainedModel:
    """Cut a model into blocks that can be trained one by one.

    Args:
        source: a model (its weights are copied, it is left untouched), a config (fresh weights), or a hub id or
            folder (loaded from safetensors, weights kept).
        num_blocks: B.
        task: what the model is for, as in `pipeline(task)`; None takes it from the source.
        config_fields: any other field of [`DiffusionBlocksConfig`].

    Returns:
        The model of the task's class, on the source's device, in its dtype and mode.

    Raises:
        ValueError: the architecture, task or model class is not supported, the source is converted already, or a
            field is out of range.
        TypeError: the source is none of the above.
    """
    if isinstance(source, (str, PathLike)):
        return _convert_pretrained(source, num_blocks, task, config_fields)
    if isinstance(source, PreTrainedConfig):
        return _model_class(source, task)(_config(source, num_blocks, config_fields))
    if not isinstance(source, PreTrainedModel):
        raise TypeError(
            f"source={type(source).__name__} must be a PreTrainedModel, a PreTrainedConfig, or a hub id or folder"
        )
    model_class = _model_class(source.config, task)
    plain_class = backbone_for(source.config).plain_class
    if type(source) is not plain_class:
        raise ValueError(f"source={type(source).__name__} must be {plain_class.__name__} for task {model_class.task!r}")
    config = _config(source.config, num_blocks, config_fields)
    name = source.config.name_or_path
    config.base_model = name if name and not Path(name).exists() else None  # a local path means nothing to others
    model = model_class._from_config(
        config, dtype=source.dtype, attn_implementation=source.config._attn_implementation
    )
    model.backbone.load_state_dict(source.state_dict())
    model.copy_backbone_parts()
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device).train(source.training)


def _convert_pretrained(source, num_blocks, task, config_fields) -> DiffusionBlocksPreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    _model_class(config, task)
    _config(config, num_blocks, config_fields)  # complain before any weights are loaded
    plain = backbone_for(config).plain_class.from_pretrained(source, use_safetensors=True)
    return convert(plain, num_blocks, task, **config_fields)


def _model_class(config: PreTrainedConfig, task: str | None) -> type[DiffusionBlocksPreTrainedModel]:
    if isinstance(config, DiffusionBlocksConfig):
        raise ValueError(
            f"source is a DiffusionBlocks model already (num_blocks={config.num_blocks}): convert the plain model"
        )
    backbone = backbone_for(config)
    if task not in (None, backbone.task):
        raise ValueError(f"task={task!r} must be {backbone.task!r} for model_type={config.model_type!r}")
    return MODELS[backbone.task]


def _config(source: PreTrainedConfig, num_blocks: int, config_fields: dict) -> DiffusionBlocksConfig:
    unknown = set(config_fields) - set(USER_FIELDS)
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: not a field of DiffusionBlocksConfig; fields are {', '.join(USER_FIELDS)}"
        )
    return DiffusionBlocksConfig(source_config=source, num_blocks=num_blocks, **config_fields)
