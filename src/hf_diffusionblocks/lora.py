"""LoRA block by block, through peft: each block's layers have an adapter of their own, trained and saved with the block.

Files are peft's, under the plain model's names: peft alone reads the adapters into the plain model, too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .diffusion.randomness import seeded
from .extras import from_extra
from .models.base import DiffusionBlocksPreTrainedModel
from .saving.adapters import BACKBONE, PEFT_PREFIX, save_block_adapters  # noqa: F401  (the last is public here)
from .saving.resident import checked_blocks

with from_extra("peft", "hf_diffusionblocks.lora"):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper

#: Fields of a LoRA config, what they have to be, and why.
REFUSED = (
    ("layers_to_transform", None, "each block has its own layers"),
    ("layer_replication", None, "a block has the layers it has"),
    ("trainable_token_indices", None, "embeddings are no block's"),
    ("target_parameters", None, "adapters are on modules"),
    ("bias", "none", "of the plain model's own weights, none is trained beside adapters"),
)


def adapter_of(block_index: int) -> str:
    """Name of a block's adapter, and of its folder in a saved model."""
    return f"block_{block_index}"


def add_block_adapters(
    model: DiffusionBlocksPreTrainedModel, config: LoraConfig, blocks: Sequence[int] | None = None
) -> DiffusionBlocksPreTrainedModel:
    """Give loaded blocks a LoRA adapter each, and train these alone.

    A block's local head (`readout_layers`) and, with `shared="per_block"`, its own final norm and head are trained whole
    beside its adapter. `modules_to_save` of the config (a new classifier, for example) are so beside the last block's.

    Args:
        model: one whose layers sigma does not modulate: any but joint text and joint classes. Changed in place.
        config: of all adapters; which layers is said here. `target_modules` is a list of parts of a layer, or
            "all-linear"; without, it is the attention's.
        blocks: which; None is all that are loaded.

    Returns:
        the model.

    Raises:
        ValueError: a block has an adapter or is not loaded, sigma modulates the layers, or the config says which layers,
            names what is not there or tied, or asks for what does not go by block; names the field.
    """
    blocks = _loaded_blocks(model, blocks)
    present = [adapter_of(block) for block in blocks if adapter_of(block) in getattr(model, "peft_config", {})]
    if present:
        raise ValueError(f"the model has adapters already: {', '.join(present)}")
    if model.denoiser.modulated:  # and GPT-2's clean stream reads its attention's weights past an adapter
        raise ValueError(
            f"denoiser={model.config.denoiser!r} has no adapters for task {model.task!r}: its modulation is not the "
            "pretrained model's, and would have to be trained whole. Convert with denoiser='factorized'"
        )
    layer = model.blocks[blocks[0]].layers[0]  # of one without adapters: another may have some
    _check(model, config)
    targets = _targets(model, layer, config)
    adapted = [(name, part) for name, part in layer.named_modules() if any(_ends_in(target, [name]) for target in targets)]
    bare = [name for name, part in adapted if part.bias is None]
    if config.lora_bias and bare:
        raise ValueError(f"lora_bias=True must be False: {', '.join(bare)} have no bias to merge it into")
    modules = [name for name, _ in model.named_modules()]
    # (By their paths: PEFT would take "norm" for every name that ends so.)
    kept_whole = [path for name in config.modules_to_save or () for path in _ends_in(name, modules)]
    seed = int(torch.randint(2**62, ()))
    with _all_in_one_place(model):
        for block in blocks:
            own = copy.deepcopy(config)
            own.fan_in_fan_out = any(isinstance(module, Conv1D) for module in layer.modules())
            own.target_modules = targets
            own.layers_to_transform = list(model.block_layers(block))
            own.layers_pattern = model.architecture.layers_path.rpartition(".")[2]
            whole = kept_whole if block == model.num_blocks - 1 else []
            own.modules_to_save = [*whole, *model.blocks[block].own_readout] or None
            with seeded([seed, block], model.device):  # as all fresh weights of a block: whichever others are loaded
                _add(model, own, block)
    _activate(model)
    return model


@contextmanager
def _all_in_one_place(model: DiffusionBlocksPreTrainedModel) -> Iterator[None]:
    """While blocks get other parameters, or lose some: those that wait in host memory afterwards are the new ones."""
    device = None if model.offload is None else model.offload.device
    model.offload_blocks(None)
    try:
        yield
    finally:
        model.offload_blocks(device)


def _loaded_blocks(model: DiffusionBlocksPreTrainedModel, blocks: Sequence[int] | None) -> list[int]:
    if blocks is None:
        return model.resident_blocks
    absent = sorted(set(checked_blocks(blocks, model.num_blocks, "blocks")) - set(model.resident_blocks))
    if absent:
        raise ValueError(f"blocks={list(blocks)} must be loaded, and {absent} are not: {model.resident_blocks} are")
    return sorted(blocks)


def _targets(model: DiffusionBlocksPreTrainedModel, layer: nn.Module, config: LoraConfig) -> list[str]:
    """The parts of a layer that are adapted."""
    linear = [name for name, part in layer.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    targets = config.target_modules or model.architecture.lora_targets
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):  # peft would look for a pattern in all layers
        raise ValueError(f"target_modules={targets!r} must be 'all-linear' or a list of a layer's {', '.join(linear)}")
    unknown = [name for name in sorted(targets) if not _ends_in(name, linear)]
    if unknown:
        raise ValueError(f"target_modules: {', '.join(unknown)} must be of a layer's {', '.join(linear)}")
    return sorted(targets)


def _check(model: DiffusionBlocksPreTrainedModel, config: LoraConfig) -> None:
    for field, allowed, reason in REFUSED:
        value = getattr(config, field, allowed)
        if value != allowed:
            raise ValueError(f"{field}={value!r} must be {allowed!r}: {reason}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} must be True, False, 'gaussian' or 'orthogonal': others change "
            "the pretrained weights, which are not saved with adapters"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if anchored := [pattern for pattern in getattr(config, field) if pattern.startswith("^")]:
            raise ValueError(f"{field}: {anchored[0]!r} must not begin with '^': names are longer here than the plain model's")
    if isinstance(config.exclude_modules, str):
        raise ValueError(f"exclude_modules={config.exclude_modules!r} must be a list of names: whole ones are longer here")
    modules = [name for name, _ in model.named_modules()]
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for name in config.modules_to_save or ():
        paths = _ends_in(name, modules)
        if not paths:
            raise ValueError(f"modules_to_save: the model has no {name!r}")
        if any(f".{model.architecture.layers_path}." in path for path in paths):
            raise ValueError(f"modules_to_save: {name!r} is in every layer, and would be the last block's; adapt it instead")
        if any(f"{path}.{key}" in tied for path in paths for key, _ in model.get_submodule(path).named_parameters()):
            raise ValueError(f"modules_to_save: {name!r} is tied to another weight, which would not follow")


def _ends_in(name: str, paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path == name or path.endswith(f".{name}")]


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


def load_block_adapters(
    model: DiffusionBlocksPreTrainedModel, folder: str | PathLike, blocks: Sequence[int] | None = None
) -> DiffusionBlocksPreTrainedModel:
    """Give a model the adapters of its loaded blocks, as [`save_block_adapters`] and the Trainer wrote them.

    Args:
        blocks: which; None is all that are loaded. The others can have theirs from elsewhere, or fresh.

    Raises:
        OSError: a block's adapter is missing; names it.
        ValueError: one does not fit the model; names the file.
    """
    paths = {block: Path(folder) / adapter_of(block) for block in _loaded_blocks(model, blocks)}
    for path in paths.values():
        if not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise OSError(f"{path / SAFETENSORS_WEIGHTS_NAME} is missing")
    fresh: dict[int, LoraConfig] = {}
    for block, path in paths.items():
        config = LoraConfig.from_pretrained(path)
        if config.layers_to_transform != list(model.block_layers(block)):
            raise ValueError(
                f"{path} is of the layers {config.layers_to_transform}, and block {block} of num_blocks={model.num_blocks} "
                f"has {list(model.block_layers(block))}: convert as it was when the adapters were trained"
            )
        if not model.has_adapters or adapter_of(block) not in model.peft_config:
            config.modules_to_save = [_in_model(saved) for saved in config.modules_to_save or ()] or None
            fresh[block] = config
    if fresh:
        with _all_in_one_place(model):
            for block, config in fresh.items():
                _add(model, config, block)
    for block, path in paths.items():
        _load(model, path / SAFETENSORS_WEIGHTS_NAME, block)
    _activate(model)
    return model


def _in_model(saved: str) -> str:
    return saved if saved.startswith(("readout_heads.", "block_readouts.")) else BACKBONE + saved


def _load(model: DiffusionBlocksPreTrainedModel, file: Path, block: int) -> None:
    state = {_in_model(key.removeprefix(PEFT_PREFIX)): tensor for key, tensor in load_file(file).items()}
    try:
        result = set_peft_model_state_dict(model, state, adapter_of(block))
    except RuntimeError as error:  # of another shape
        raise ValueError(f"{file} does not fit the model: {' '.join(str(error).split())}") from None
    odd = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{adapter_of(block)}." in key)]
    if odd:
        raise ValueError(f"{file} does not fit the model: {odd[0]}")


def merge_and_unload(model: DiffusionBlocksPreTrainedModel) -> DiffusionBlocksPreTrainedModel:
    """Add all adapters to the weights, in place: what is left is a model like any other.

    Raises:
        ValueError: there are no adapters.
    """
    if not model.has_adapters:
        raise ValueError("the model has no adapters: add_block_adapters gives it some")
    with _all_in_one_place(model):
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                model.set_submodule(name, module.unload_and_optionally_merge_module(True, False, None))
            elif isinstance(module, BaseTunerLayer):
                module.merge()
                model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)
