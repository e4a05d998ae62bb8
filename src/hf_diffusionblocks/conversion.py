"""`convert`: a plain HF model, config, hub id or folder becomes a DiffusionBlocks model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .configuration import DiffusionBlocksConfig, check_known
from .models.base import DiffusionBlocksPreTrainedModel
from .models.verification import check_cut
from .presets import with_preset
from .saving.checks import check_no_adapter_folder, check_no_adapters, check_weights, is_untied
from .saving.resident import HUB_KWARGS, MODEL_KWARGS, NotLoaded, build, checked_blocks, first_unset, hub_kwargs
from .streaming import stream_of
from .tasks import TASKS, backbone_for, backbone_named, task_of


#: Of a text, in the comparison of a cut model with the stock one.
TOKENS_COMPARED = 8
#: Arguments that say which files of a saved model are read.
ONLY_SAVED = (*HUB_KWARGS, "variant")


def convert(
    source: nn.Module | PreTrainedConfig | str | PathLike,
    num_blocks: int | None = None,
    task: str | None = None,
    resident_blocks: Sequence[int] | None = None,
    *,
    preset: str = "recommended",
    **fields,
) -> DiffusionBlocksPreTrainedModel:
    """Cut a model into blocks that can be trained one by one.

    Args:
        source: a model (its weights are copied, it is left untouched), a config (fresh weights), or a hub id or
            folder (loaded from safetensors, weights kept).
        num_blocks: B; None is as many as `layers_per_block` names, or else 4, or one a layer where there are fewer; of an
            architecture that is one block (recurrent depth), 1.
        task: what the model is for, as in `pipeline(task)`; None takes it from the source.
        resident_blocks: the blocks to load, for a job that trains these; the others never take memory. None: all.
            Fresh weights of a block depend on PyTorch's seed and the block, not on what else is loaded.
        preset: the formulation: "recommended" (what measured best for the task and for pretrained or fresh weights), or
            "paper".
        fields: any other field of [`DiffusionBlocksConfig`], and of `from_pretrained`: `dtype`, `attn_implementation` and,
            for a hub id or folder, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `subfolder`, `variant`.

    Returns:
        The model of the task's class, on the source's device, in its mode and, unless it is given, its dtype.

    Raises:
        ValueError: the architecture, task or model class is not supported, the source is converted already, or a
            field is out of range or does not go with the source; or blocks give other logits or gradients than the source.
        TypeError: the source is none of the above.
    """
    loading = _taken_from(fields)
    if isinstance(source, (str, PathLike)):
        check_no_adapter_folder(Path(source))
        return _convert_pretrained(source, num_blocks, task, resident_blocks, preset, fields, loading)
    if isinstance(source, nn.Module):
        check_no_adapters(source)
        if stream_of(source) is not None:
            raise ValueError(
                f"source={type(source).__name__} is streamed: call stop() of its stream, convert it, and stream what that gives"
            )
        check_weights(source, "blocks would have its codes without their scales")
    plain_config = source if isinstance(source, PreTrainedConfig) else _config_of(source)
    _check_plain(plain_config)
    if hub_only := [name for name in loading if name in ONLY_SAVED]:
        raise ValueError(  # without values: one may be a token
            f"{', '.join(hub_only)} must not be given with source={type(source).__name__}: for a hub id or folder only"
        )
    if loading.get("dtype") == "auto":
        loading["dtype"] = source.dtype
    if isinstance(source, PreTrainedConfig):
        config = _config(plain_config, num_blocks, task, preset, "fresh", fields)
        return _checked(build(TASKS[config.task].model_class, config, resident_blocks, **loading))
    task = task_of(plain_config, task, source).name
    config = _config(plain_config, num_blocks, task, preset, "pretrained", fields)
    plain_class = config.architecture.plain_class
    if getattr(source, "part_of", type(source)) is not plain_class:
        raise ValueError(f"source={type(source).__name__} must be {plain_class.__name__} for task {config.task!r}")
    return _convert_model(source, config, resident_blocks, **loading)


def _taken_from(fields: dict) -> dict:
    """Those that are for `from_pretrained`, which the fields then lack; None stands for none."""
    if "trust_remote_code" in fields:
        raise ValueError(
            f"trust_remote_code={fields['trust_remote_code']!r} must not be given: only architectures of Transformers "
            "itself can be cut into blocks"
        )
    if "device_map" in fields:
        raise ValueError(
            f"device_map={fields['device_map']!r} must not be given: convert, save_pretrained, then "
            "from_pretrained(..., device_map=...), or move the converted model by .to(device)"
        )
    if "torch_dtype" in fields:  # its older name
        fields.setdefault("dtype", fields.pop("torch_dtype"))
    given = {name: fields.pop(name) for name in (*ONLY_SAVED, *MODEL_KWARGS) if name in fields}
    return {name: value for name, value in given.items() if value is not None}


def _config_of(source: nn.Module) -> PreTrainedConfig:
    """The config of a stock model, of Transformers or of another library."""
    if isinstance(source, PreTrainedModel):
        if not is_untied(source):
            return source.config
        config = copy.deepcopy(source.config)
        config.tie_word_embeddings = False
        return config
    if not isinstance(source, nn.Module):
        raise TypeError(f"source={type(source).__name__} must be a PreTrainedModel, a PreTrainedConfig, or a hub id or folder")
    return backbone_named(type(source).__name__).config_of(source)


def read_config(source: str | PathLike, **hub: Any) -> PreTrainedConfig:
    """The config of a saved stock model, of Transformers or of diffusers.

    Args:
        source: hub id, folder, or config file.
        hub: where on the Hub, and how, to find it; and fields to change.

    Raises:
        OSError: there is none.
        ValueError: it is of a model of diffusers that cannot be cut.
    """
    fields, _ = PreTrainedConfig.get_config_dict(source, **hub)
    if "_class_name" not in fields:
        return AutoConfig.from_pretrained(source, **hub)
    return backbone_named(fields["_class_name"]).config_from({**fields, **hub})


def _convert_model(source: nn.Module, config, resident_blocks, **model_kwargs) -> DiffusionBlocksPreTrainedModel:
    plain_config = _config_of(source)
    name = plain_config.name_or_path
    config.base_model = name if name and not Path(name).exists() else None  # a local path means nothing to others
    of_source = {"dtype": next(source.parameters()).dtype}
    if not plain_config.sub_configs:  # (parts of a composite have one each)
        of_source["attn_implementation"] = plain_config._attn_implementation
    model = build(TASKS[config.task].model_class, config, resident_blocks, **{**of_source, **model_kwargs})
    model.copy_weights(source)
    if model.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return _checked(model.to(next(source.parameters()).device), source).train(source.training)


def _checked(model: DiffusionBlocksPreTrainedModel, source: nn.Module | None = None) -> DiffusionBlocksPreTrainedModel:
    """The model, once its blocks have been run beside the stock model. (Where blocks are missing, or weights, nothing can be.)"""
    if model.device.type == "meta":
        return model
    if len(model.resident_blocks) < model.num_blocks:
        if name := first_unset(model):
            raise ValueError(
                f"resident_blocks={model.resident_blocks} must be None: {name} has its value from the constructor of the whole "
                "model. Save that, and load a part of it"
            )
    elif model.formulation.runs_stock:
        config = model.config.source_config
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        num_tokens = min(longest, TOKENS_COMPARED) if isinstance(longest, int) and longest > 0 else TOKENS_COMPARED
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check_cut(model, TASKS[model.task].example(config, 2, num_tokens), source)
    return model


def _convert_pretrained(source, num_blocks, task, resident_blocks, preset, fields, loading) -> DiffusionBlocksPreTrainedModel:
    hub = hub_kwargs(loading)
    plain_config = read_config(source, **hub)
    _check_plain(plain_config)
    config = _config(plain_config, num_blocks, task, preset, "pretrained", fields)  # complain before anything is loaded
    found = TASKS[config.task].fields_of_source(source, **hub)
    fields = {**fields, **{name: value for name, value in found.items() if fields.get(name) is None}}
    choices = (num_blocks, task, preset, "pretrained", fields)
    plain = config.architecture.load_plain(plain_part(config, resident_blocks), source, plain_config, **loading)
    check_no_adapters(plain)
    check_weights(plain, "blocks would have its codes without their scales")
    return _convert_model(plain, _config(_config_of(plain), *choices), resident_blocks)


def plain_part(config: DiffusionBlocksConfig, resident_blocks: Sequence[int] | None) -> type[PreTrainedModel]:
    """The stock class for `from_pretrained`: without the layers of other blocks, which it then never reads. (The last ones
    are, where local heads start as they do.)"""
    plain_class = config.architecture.plain_class
    if resident_blocks is None or not issubclass(plain_class, PreTrainedModel):  # another library's are read whole
        return plain_class
    architecture, resident = config.architecture, checked_blocks(resident_blocks, config.num_blocks, "resident_blocks")
    absent = (config.block_layers(block) for block in range(config.num_blocks) if block not in resident)
    head = range(config.num_hidden_layers - (config.local_head_layers or 0), config.num_hidden_layers)
    layers = [layer for block in absent for layer in block if layer not in head]

    class Part(plain_class):
        part_of = plain_class
        # In whatever way an older checkpoint names its layers
        _keys_to_ignore_on_load_unexpected = [
            *(plain_class._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.)(layers?|h)\.({'|'.join(map(str, layers))})\.",
        ]

        def __init__(self, config: PreTrainedConfig):
            super().__init__(config)
            layers_path = architecture.layers_path(self, architecture.num_layers(config))
            tied = [name for pair in architecture.ties_of_layers(self, layers_path) for name in pair]
            for path in (f"{path}.{layer}" for path in architecture.layer_lists(self, layers_path) for layer in layers):
                if not any(name.startswith(f"{path}.") for name in tied):  # (what others share is read)
                    self.set_submodule(path, NotLoaded(self.get_submodule(path)))

    return Part


def _check_plain(config: PreTrainedConfig) -> None:
    if isinstance(config, DiffusionBlocksConfig):
        raise ValueError(f"source is a DiffusionBlocks model already (num_blocks={config.num_blocks}): convert the plain model")


def _config(
    source: PreTrainedConfig, num_blocks: int | None, task: str | None, preset: str, start: str, fields: dict
) -> DiffusionBlocksConfig:
    check_known(fields)
    if num_blocks is not None:
        fields = {"num_blocks": num_blocks, **fields}
    task = task_of(source, task).name
    fields = with_preset(preset, task, start, fields, backbone_for(source, task))
    return DiffusionBlocksConfig(source_config=source, task=task, **fields)
