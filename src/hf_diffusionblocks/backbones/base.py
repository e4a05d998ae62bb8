"""Which stock model is cut into blocks, and what the house has to know of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..streaming.layers import find_layers
from .modulation import Modulation


class Backbone:
    """A stock model of one task. It knows no formulation, and patches nothing.

    Most architectures need no more than this: their own forward runs their layers ([`StockRun`](stock_run.py)).

    Args:
        plain_class: the stock model that is converted.
    """

    #: Fields of DiffusionBlocksConfig without a choice for it, and what they are; why is said in `fixed_because`
    fixed_fields: ClassVar[Mapping[str, Any]] = {}
    fixed_because: ClassVar[str] = ""
    layers_are_alike: ClassVar[bool] = True  #: of one width, so that one head reads what leaves any

    def __init__(self, plain_class: type[nn.Module]):
        self.plain_class = plain_class

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError if this config asks for something that cannot be cut into blocks."""
        if getattr(config, "output_router_logits", False):
            raise ValueError("output_router_logits=True must be False: the loss of routers couples all layers")

    def check_modulation(self, config: PreTrainedConfig) -> None:
        """Raise ValueError if noise levels cannot modulate the layers of this config, as the paper's denoisers ask for."""
        raise ValueError(
            f"preset='paper' must be 'recommended' for model_type={config.model_type!r}: AdaLN is known of the layers of GPT-2, "
            "Llama, Qwen3 and ViT alone"
        )

    # ---- the stock model as a whole

    @property
    def plain_name(self) -> str:
        """The name of `plain_class`, known where the library that has it is missing, too."""
        return self.plain_class.__name__

    def config_of(self, plain: nn.Module) -> PreTrainedConfig:
        """The config of a stock model."""
        return plain.config

    def make_plain(self, config: PreTrainedConfig) -> nn.Module:
        """A stock model, with weights as its class leaves them."""
        return self.plain_class(config)

    def load_plain(
        self, plain_class: type[nn.Module], source: str | PathLike, config: PreTrainedConfig, **loading
    ) -> nn.Module:
        """A saved stock model, from safetensors.

        Args:
            plain_class: `plain_class`, or one of it that leaves layers out.
            source: hub id or folder.
            config: of the model.
            loading: `dtype`, `attn_implementation`, and what the Hub takes.
        """
        return plain_class.from_pretrained(source, config=config, use_safetensors=True, **loading)

    def init_weights(self, plain: nn.Module, module: nn.Module) -> None:
        """Give one module of this architecture fresh weights, as the stock model does."""
        plain._init_weights(module)

    def largest_step(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What the stock model's `forward` is told for a training step that holds as much as any, where steps differ."""
        return {}

    # ---- sizes

    def num_layers(self, config: PreTrainedConfig) -> int:
        """How many layers there are to cut: of encoder and decoder, those of the decoder.

        Raises:
            ValueError: the config does not say.
        """
        decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
        names = ("decoder_layers", "num_decoder_layers") if decodes else ()
        return _said(config, *names, "num_layers", "num_hidden_layers")

    def width(self, config: PreTrainedConfig) -> int:
        """D, of hidden states."""
        return _said(config, "hidden_size")

    # ---- its parts

    def layers_path(self, plain: nn.Module, num_layers: int) -> str:
        """Path of the list of its layers, for example "vit.layers".

        Of several lists (towers of images and sound, an encoder) it is the decoder's, which reads the others.

        Raises:
            ValueError: there is none of so many layers.
        """
        lists = [path.rpartition(".")[0] for path in find_layers(plain)]
        found = [path for path in dict.fromkeys(lists) if lists.count(path) == num_layers]
        if len(found) > 1 and isinstance(plain, PreTrainedModel):
            of_decoder = {id(module) for module in plain.get_decoder().modules()}
            found = [path for path in found if id(plain.get_submodule(path)) in of_decoder] or found
        if not found:
            raise ValueError(
                f"{self.plain_class.__name__} cannot be cut into blocks: it must have a list of {num_layers} layers, and has none"
            )
        return min(found[::-1], key=lambda path: path.count("."))  # the outermost, and of these the last

    def layer_lists(self, plain: nn.Module, layers_path: str) -> list[str]:
        """Paths of the lists that a layer has an element of each of, called in turn: one, but where no module is a layer (XLM)."""
        paths = dict.fromkeys(path.rpartition(".")[0] for path in find_layers(plain))
        layers, parent = plain.get_submodule(layers_path), layers_path.rpartition(".")[0]
        beside = [path for path in paths if path.rpartition(".")[0] == parent and len(plain.get_submodule(path)) == len(layers)]
        return [layers_path] if isinstance(layers[0], GradientCheckpointingLayer) else beside

    def ties_of_layers(self, plain: nn.Module, layers_path: str) -> list[tuple[str, str]]:
        """Names of parameters inside of layers that are one (Zamba's)."""
        ties = getattr(plain, "all_tied_weights_keys", {}).items()
        return [pair for pair in ties if all(name.startswith(f"{layers_path}.") for name in pair)]


def _said(config: PreTrainedConfig, *names: str) -> int:
    """A size by its first name that is known, by the config of a model or, of a composite, of its text."""
    for name in names:
        value = getattr(config, name, getattr(config.get_text_config(decoder=True), name, None))
        if isinstance(value, int):
            return value
    raise ValueError(f"model_type={config.model_type!r} cannot be cut into blocks: its config says no {names[-1]}")


def parts_around(plain: nn.Module, layers_path: str, lists: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Paths of what stands before a list of layers in a stock model, and after it, as all does that stands beside its base
    model. (What has buffers alone, as tables of rotary positions, is neither; nor are other lists of layers.)"""
    before, after, module, prefix, names = [], [], plain, "", layers_path.split(".")
    has_base = isinstance(plain.get_submodule(names[0]), PreTrainedModel)
    for name in names:
        found = after if module is plain and has_base else before
        for child_name, child in module.named_children():
            if child_name == name:
                found = after
            elif prefix + child_name in lists:
                continue
            elif any(True for _ in child.parameters()) or not any(True for _ in child.buffers()):
                found.append(prefix + child_name)
        module, prefix = module.get_submodule(name), f"{prefix}{name}."
    return before, after


class PiecewiseBackbone(Backbone):
    """A stock model that is run piece by piece: where noise levels modulate its layers, or each block conditions itself.

    It calls the sub-modules of the stock model in their own order. Hidden states are `[N, S, D]`. Wherever a method takes
    the stock model, a [`Parts`] of it will do.
    """

    def embed(self, plain: nn.Module, **inputs) -> torch.Tensor:
        """The hidden states that enter the first layer."""
        raise NotImplementedError

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **attention) -> torch.Tensor:
        """One layer. With no modulation (where nothing modulates), or one at its start, this is the stock layer, bit for bit.

        `attention` holds what the stock layer takes besides hidden states (masks, positions, cache, conditions).
        """
        raise NotImplementedError

    def read_out(self, plain: nn.Module, hidden: torch.Tensor, **conditions) -> torch.Tensor:
        """What the stock model makes of its last hidden states: final norm and head."""
        raise NotImplementedError


class Parts(nn.Module):
    """Copies of some of a stock model's parts under their own paths, for a block that shares them with no other."""

    def __init__(self, plain: nn.Module, paths: Sequence[str]):
        super().__init__()
        for path in paths:
            *parents, name = path.split(".")
            node: nn.Module = self
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = node.get_submodule(parent)
            node.add_module(name, copy.deepcopy(plain.get_submodule(path)))
