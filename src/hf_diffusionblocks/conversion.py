"""`convert`: a plain HF model, config, hub id or folder becomes a DiffusionBlocks model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .backbones import backbone_for
from .configuration import USER_FIELDS, DiffusionBlocksConfig
from .models import MODELS, DiffusionBlocksPreTrainedModel
from .models.partial import NotLoaded, build, checked_blocks


def convert(
    source: PreTrainedModel | PreTrainedConfig | str | PathLike,
    num_blocks: int = 4,
    task: str | None = None,
    resident_blocks: Sequence[int] | None = None,
    **config_fields,
) -> DiffusionBlocksPreTrainedModel:
    """Cut a model into blocks that can be trained one by one.

    Args:
        source: a model (its weights are copied, it is left untouched), a config (fresh weights), or a hub id or
            folder (loaded from safetensors, weights kept).
        num_blocks: B.
        task: what the model is for, as in `pipeline(task)`; None takes it from the source.
        resident_blocks: the blocks to load, for a job that trains these; the others never take memory. None: all.
            Fresh weights of a block depend on PyTorch's seed and the block, not on what else is loaded.
        config_fields: any other field of [`DiffusionBlocksConfig`].

    Returns:
        The model of the task's class, on the source's device, in its dtype and mode.

    Raises:
        ValueError: the architecture, task or model class is not supported, the source is converted already, or a
            field is out of range.
        TypeError: the source is none of the above.
    """
    if isinstance(source, (str, PathLike)):
        return _convert_pretrained(source, num_blocks, task, resident_blocks, config_fields)
    if isinstance(source, PreTrainedConfig):
        return build(_model_class(source, task), _config(source, num_blocks, config_fields), resident_blocks)
    if not isinstance(source, PreTrainedModel):
        raise TypeError(
            f"source={type(source).__name__} must be a PreTrainedModel, a PreTrainedConfig, or a hub id or folder"
        )
    model_class = _model_class(source.config, task)
    plain_class = backbone_for(source.config).plain_class
    if getattr(source, "part_of", type(source)) is not plain_class:
        raise ValueError(f"source={type(source).__name__} must be {plain_class.__name__} for task {model_class.task!r}")
    return _convert_model(source, model_class, num_blocks, resident_blocks, config_fields)


def _convert_model(source, model_class, num_blocks, resident_blocks, config_fields) -> DiffusionBlocksPreTrainedModel:
    config = _config(source.config, num_blocks, config_fields)
    name = source.config.name_or_path
    config.base_model = name if name and not Path(name).exists() else None  # a local path means nothing to others
    model = build(
        model_class, config, resident_blocks, dtype=source.dtype,
        attn_implementation=source.config._attn_implementation,
    )  # fmt: skip
    model.copy_weights(source)
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device).train(source.training)


def _convert_pretrained(source, num_blocks, task, resident_blocks, config_fields) -> DiffusionBlocksPreTrainedModel:
    plain_config = AutoConfig.from_pretrained(source)
    model_class = _model_class(plain_config, task)
    config = _config(plain_config, num_blocks, config_fields)  # complain before any weights are loaded
    plain_class = plain_part(config, resident_blocks)
    plain = plain_class.from_pretrained(source, use_safetensors=True)
    return _convert_model(plain, model_class, num_blocks, resident_blocks, config_fields)


def plain_part(config: DiffusionBlocksConfig, resident_blocks: Sequence[int] | None) -> type[PreTrainedModel]:
    """The stock class for `from_pretrained`: without the layers of other blocks, which it then never reads. (The last ones
    are, where local heads start as they do.)"""
    plain_class = backbone_for(config.source_config).plain_class
    if resident_blocks is None:
        return plain_class
    resident = checked_blocks(resident_blocks, config.num_blocks, "resident_blocks")
    absent = (config.block_layers(block) for block in range(config.num_blocks) if block not in resident)
    head = range(config.num_hidden_layers - config.readout_layers, config.num_hidden_layers)
    layers = [layer for block in absent for layer in block if layer not in head]
    path = backbone_for(config.source_config).layers_path

    class Part(plain_class):
        part_of = plain_class
        # In whatever way an older checkpoint names its layers
        _keys_to_ignore_on_load_unexpected = [
            *(plain_class._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.)(layers?|h)\.({'|'.join(map(str, layers))})\.",
        ]

        def __init__(self, config: PreTrainedConfig):
            super().__init__(config)
            for layer in layers:
                self.set_submodule(f"{path}.{layer}", NotLoaded())

    return Part


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
