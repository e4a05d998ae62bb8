"""Models that hold some of their blocks only: built on the meta device, and given memory for what stays."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from os import PathLike

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..configuration import DiffusionBlocksConfig
from ..diffusion.randomness import seeded
from ..whole_numbers import is_whole
from . import shards

#: Arguments of `from_pretrained` that say where on the Hub, and how, to find a file.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
#: Those that say how the model is built.
MODEL_KWARGS = ("dtype", "attn_implementation")


class NotLoaded(nn.Module):
    """Stands where a block that is not loaded has its modules.

    Args:
        module: that it stands for, of which it has what others may read: as the kind of attention, and weights without
            memory, which a stock model that starts its parts' takes for started.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        for of in (*type(module).__mro__[::-1], module):  # its own come last
            if of not in nn.Module.__mro__:
                plain = {name: value for name, value in vars(of).items() if isinstance(value, (str, int, float))}
                vars(self).update({name: value for name, value in plain.items() if not name.startswith("__")})
        for name, weight in module.named_parameters(recurse=False):
            vars(self)[name] = torch.empty_like(weight, device="meta", requires_grad=False)
            vars(self)[name]._is_hf_initialized = True

    def forward(self, *args, **kwargs):
        raise ValueError("this block is not loaded: see model.resident_blocks")


def build(
    model_class: type[PreTrainedModel],
    config: DiffusionBlocksConfig,
    resident_blocks: Sequence[int] | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A model with fresh weights, of which only `resident_blocks` (None: all) ever take memory.

    A block's weights follow from PyTorch's global seed and its own index: they are the same whichever others are built.

    Args:
        kwargs: `dtype` and `attn_implementation`.

    Raises:
        ValueError: there are no such blocks.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    model = build_empty(model_class, config, resident_blocks, **kwargs)
    if model.device.type == "meta":
        return model
    owner_of = {name: model.block_of_parameter(name) for name, _ in _tensors(model)}
    for owner in (None, *model.resident_blocks):
        with seeded([seed, 0 if owner is None else owner + 1], model.device):
            _initialize(model, {name for name, of in owner_of.items() if of == owner})
    return model


def build_empty(
    model_class: type[PreTrainedModel],
    config: DiffusionBlocksConfig,
    resident_blocks: Sequence[int] | None,
    **kwargs,
) -> PreTrainedModel:
    """The same, with memory for weights, but none in it yet. (Buffers that are not saved have their values.)"""
    if resident_blocks is None and torch.get_default_device().type != "meta":
        with torch.random.fork_rng(devices=[]):
            return model_class._from_config(config, **kwargs)
    with torch.device("meta"):
        model = model_class._from_config(config, **kwargs)
    if resident_blocks is not None:
        model.resident_blocks = checked_blocks(resident_blocks, config.num_blocks, "resident_blocks")
        _remove(model, [block for block in range(config.num_blocks) if block not in model.resident_blocks])
        model.tie_within_blocks()
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    device = torch.get_default_device()
    if device.type != "meta":
        model.to_empty(device="cpu").tie_weights()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)  # until it is set: see `first_unset`
        _initialize(model, set())
        model.to(device)
    return model


def first_unset(model: PreTrainedModel) -> str | None:
    """The name of something that [`build_empty`] has made and nobody has set since: what the stock model's constructor alone
    gives values; None: there is nothing."""
    made = ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point() and tensor.numel())
    return next((name for name, tensor in made if bool(tensor.flatten()[0].isnan())), None)


def load(
    model_class: type[PreTrainedModel], source: str | PathLike, resident_blocks: Sequence[int], **kwargs
) -> PreTrainedModel:
    """What `from_pretrained(source, resident_blocks=...)` does; reads the files of these blocks and of what is shared."""
    hub = hub_kwargs(kwargs)
    if "torch_dtype" in kwargs:  # its older name
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    model_kwargs = {key: kwargs.pop(key) for key in MODEL_KWARGS if kwargs.get(key) is not None}
    if model_kwargs.get("dtype") == "auto":
        model_kwargs.pop("dtype")  # is what the config says
    config = kwargs.pop("config", None)
    if config is None:  # as in Transformers, the rest may be fields of it
        config, kwargs = DiffusionBlocksConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
    given = [key for key, value in kwargs.items() if value and key != "adapter_kwargs" and not key.startswith("_")]
    refused = [key for key in given if key not in hub]
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot be combined with resident_blocks={list(resident_blocks)}")
    model = build_empty(model_class, config, resident_blocks, **model_kwargs)
    index = shards.saved_index(source, **hub)
    check_cut(model, source, index)
    weights = {}
    for block in (None, *model.resident_blocks):
        weights |= shards.load_block_state_dict(source, block, **hub)
    tied = model.all_tied_weights_keys
    check_complete(source, model.state_dict().keys() - weights.keys() - tied.keys(), index)
    for target, of in list(tied.items()):
        if {target, of} <= weights.keys() and not torch.equal(weights[target], weights[of]):
            _untie(model, target)
    model.load_state_dict(weights, strict=False)
    model.provenance = index.provenance
    if model.can_generate() and cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub):
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    return model.eval()


def _untie(model: PreTrainedModel, target: str) -> None:
    """Give a tied weight memory of its own: as in Transformers, what differs in the files is not tied."""
    module, _, name = target.rpartition(".")
    setattr(model.get_submodule(module), name, nn.Parameter(torch.empty_like(model.get_parameter(target))))
    model.all_tied_weights_keys.pop(target)


def hub_kwargs(kwargs: dict) -> dict:
    """Those of HUB_KWARGS that are given."""
    return {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}


def check_cut(model: PreTrainedModel, source: str | PathLike, index: shards.Index) -> None:
    """Raise ValueError if the files of this checkpoint were cut into other blocks than the model's config says."""
    if index.files is None:  # of a plain model
        return
    config = model.config
    for name, file in index.weight_map.items():
        block = model.block_of_parameter(name)
        part = "shared" if block is None else str(block)
        if index.files.get(part) != file:
            raise ValueError(
                f"{source} was cut into other blocks than its config says (num_blocks={config.num_blocks}, "
                f"layers_per_block={config.layers_per_block}): {file} holds {name}, which the config "
                f"has in the file of {part}"
            )


def check_whole(model: PreTrainedModel, source: str | PathLike, index: shards.Index) -> None:
    """Raise ValueError if this checkpoint, which all of the model was loaded from, holds some of the blocks only."""
    missing = [block for block in range(model.num_blocks) if index.files is not None and str(block) not in index.files]
    if missing:
        raise ValueError(
            f"{source} lacks the blocks {missing} of {model.num_blocks}: load what it has with resident_blocks=..., or "
            "join it with the jobs that trained them by merge_blocks"
        )


def check_complete(source: str | PathLike, missing: Collection[str], index: shards.Index) -> None:
    """Raise ValueError if a checkpoint lacks some of a model's weights; names them, and the file that should have the first."""
    if missing:
        first, *others = sorted(missing)
        where = f" in {index.weight_map[first]}" if first in index.weight_map else ""
        raise ValueError(f"{source} lacks {', '.join([first + where, *others[:2]])}, {len(missing)} weights in all")


def checked_blocks(blocks: Iterable[int], num_blocks: int, field: str) -> list[int]:
    """Blocks in ascending order.

    Raises:
        ValueError: these are none, or no list; one occurs twice, or the model has no such block; names the field.
    """
    chosen = list(blocks) if isinstance(blocks, Iterable) else []
    whole = all(is_whole(block, 0) and block < num_blocks for block in chosen)
    if not chosen or not whole or len(set(chosen)) < len(chosen):
        raise ValueError(f"{field}={blocks!r} must be a list of different blocks of 0..{num_blocks - 1}, at least one")
    return sorted(chosen)


def _remove(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Replace every module all of whose parameters belong to these blocks."""

    def replace_within(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}."
            owners = {model.block_of_parameter(path + parameter) for parameter, _ in child.named_parameters()}
            if owners and owners <= set(blocks) and not isinstance(child, nn.ModuleList):
                setattr(module, name, NotLoaded(child))
            elif owners & set(blocks):
                replace_within(child, path)

    replace_within(model, "")


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _initialize(model: PreTrainedModel, names: set[str]) -> None:
    """Run Transformers' initialisation, of these parameters and saved buffers alone, and of buffers that are not saved."""
    saved = model.state_dict().keys()
    for name, tensor in _tensors(model):
        tensor._is_hf_initialized = name in saved and name not in names
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
