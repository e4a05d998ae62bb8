"""LoRA block by block, through peft: each block's layers have an adapter of their own, trained and saved with the block."""

from __future__ import annotations

import copy
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from .models import DiffusionBlocksPreTrainedModel


def adapter_of(block_index: int) -> str:
    """Name of a block's adapter, and of its folder in a saved model."""
    return f"block_{block_index}"


def add_block_adapters(model: DiffusionBlocksPreTrainedModel, config: LoraConfig) -> DiffusionBlocksPreTrainedModel:
    """Give every loaded block a LoRA adapter, and train these alone.

    With `shared="per_block"` a block's own final norm and head are trained whole beside its adapter. `modules_to_save` of
    the config are too, and go with the last block: a new classifier, for example.

    Args:
        model: changed in place.
        config: of all adapters; which layers is said here. Without `target_modules`, the attention's.

    Returns:
        the model.

    Raises:
        ValueError: the model has adapters, or the config says which layers.
    """
    if has_adapters(model):
        raise ValueError(f"the model has adapters already: {', '.join(model.peft_config)}")
    if config.layers_to_transform is not None:
        raise ValueError(f"layers_to_transform={config.layers_to_transform} must be None: each block has its own layers")
    seed = int(torch.randint(2**62, ()))
    layer = model.layer(model.block_layers(model.resident_blocks[0])[0])
    for block in model.resident_blocks:
        own = copy.deepcopy(config)
        own.fan_in_fan_out = any(isinstance(module, Conv1D) for module in layer.modules())
        own.target_modules = config.target_modules or list(model.architecture.lora_targets)
        own.layers_to_transform = list(model.block_layers(block))
        own.layers_pattern = model.architecture.layers_path.rpartition(".")[2]
        whole = list(config.modules_to_save or []) if block == model.num_blocks - 1 else []
        own.modules_to_save = [*whole, *(_own_readout(model, block) if model.per_block else [])] or None
        with torch.random.fork_rng(devices=[]):  # as all fresh weights of a block: whichever others are loaded
            torch.manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1)[0]))
            _add(model, own, block)
    _activate(model)
    return model


def has_adapters(model: DiffusionBlocksPreTrainedModel) -> bool:
    """Whether blocks have adapters."""
    return bool(getattr(model, "peft_config", None))


def _own_readout(model: DiffusionBlocksPreTrainedModel, block: int) -> list[str]:
    last = block == model.num_blocks - 1
    prefix = "backbone" if last else f"block_readouts.{block}"
    return [f"{prefix}.{path}" for path in model.architecture.readout_paths]


def _add(model: DiffusionBlocksPreTrainedModel, config: LoraConfig, block: int) -> None:
    # What `model.add_adapter` does, but for making this one the active adapter of all blocks.
    config.base_model_name_or_path = model.config.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one a block is the idea
        inject_adapter_in_model(config, model, adapter_of(block))
    model._hf_peft_config_loaded = True


def _activate(model: DiffusionBlocksPreTrainedModel) -> None:
    """Have each block run with its own adapter."""
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            block = model.block_of_parameter(f"{name}.")
            module.set_adapter(adapter_of(model.num_blocks - 1 if block is None else block))


def save_block_adapters(model: DiffusionBlocksPreTrainedModel, folder: str | PathLike) -> None:
    """Write each block's adapter to a folder of its own: `block_0/adapter_model.safetensors` and its config."""
    for name, config in model.peft_config.items():
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        state = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}
        save_file(state, target / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(target)


def load_block_adapters(
    model: DiffusionBlocksPreTrainedModel, folder: str | PathLike
) -> DiffusionBlocksPreTrainedModel:
    """Give a model the adapters of its loaded blocks, as [`save_block_adapters`] and the Trainer wrote them.

    Raises:
        OSError: a block's adapter is missing; names it.
    """
    paths = {block: Path(folder) / adapter_of(block) for block in model.resident_blocks}
    for path in paths.values():
        if not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise OSError(f"{path / SAFETENSORS_WEIGHTS_NAME} is missing")
    for block, path in paths.items():
        if not has_adapters(model) or adapter_of(block) not in model.peft_config:
            _add(model, LoraConfig.from_pretrained(path), block)
        set_peft_model_state_dict(model, load_file(path / SAFETENSORS_WEIGHTS_NAME), adapter_of(block))
    _activate(model)
    return model


def merge_and_unload(model: DiffusionBlocksPreTrainedModel) -> DiffusionBlocksPreTrainedModel:
    """Add all adapters to the weights, in place: what is left is a model like any other.

    Raises:
        ValueError: there are no adapters.
    """
    if not has_adapters(model):
        raise ValueError("the model has no adapters: add_block_adapters gives it some")
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.unload_and_optionally_merge_module(True, False, None))
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)
