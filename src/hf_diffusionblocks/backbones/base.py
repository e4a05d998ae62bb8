"""What the house has to know of an architecture, and the table of those it knows. A new one is one subclass, in a file of
its own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .modulation import Modulation


class Backbone(ABC):
    """One architecture: which stock model it is, and how to run it piece by piece. It knows no task.

    A backbone holds no weights and patches nothing: it calls the sub-modules of the stock model in their own order.
    Hidden states are `[N, S, D]`. Wherever a method takes the stock model, a [`Parts`] of it will do.
    """

    model_type: ClassVar[str]  #: `model_type` of the plain model's config
    plain_class: ClassVar[type[nn.Module]]  #: the stock model that is converted
    layers_path: ClassVar[str]  #: path of its list of layers, for example "vit.layers"
    embedding_paths: ClassVar[Sequence[str]]  #: paths of what the input runs through before the first layer
    readout_paths: ClassVar[Sequence[str]]  #: paths of what `read_out` uses
    tasks: ClassVar[Sequence[str] | None] = None  #: what it serves, as in pipeline(task); None: all that its kind does
    #: Fields of DiffusionBlocksConfig without a choice for it, and what they are; why is said in `fixed_because`
    fixed_fields: ClassVar[Mapping[str, Any]] = {}
    fixed_because: ClassVar[str] = ""

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError if this config asks for something that cannot be cut into blocks."""

    # ---- the stock model as a whole

    @property
    def plain_name(self) -> str:
        """The name of `plain_class`, known where the library that has it is missing, too."""
        return self.plain_class.__name__

    def config_of(self, plain: nn.Module) -> PreTrainedConfig:
        """The config of a stock model."""
        return plain.config

    def config_from(self, fields: Mapping[str, Any]) -> PreTrainedConfig:
        """The config that a saved stock model's `config.json` says, where Transformers cannot read it."""
        raise NotImplementedError

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

    def checkpoint_layers(self, plain: nn.Module) -> None:
        """Have the stock model compute the activations of its layers again in the backward pass."""
        plain.activation_checkpointing_enable()

    def largest_step(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What the stock model's `forward` is told for a training step that holds as much as any, where steps differ."""
        return {}

    # ---- sizes

    def num_layers(self, config: PreTrainedConfig) -> int:
        """How many layers there are to cut."""
        return config.num_hidden_layers

    def width(self, config: PreTrainedConfig) -> int:
        """D, of hidden states."""
        return config.hidden_size

    @abstractmethod
    def num_logits(self, config: PreTrainedConfig) -> int | None:
        """V, the last dimension of what `read_out` gives; None if these are no logits."""

    # ---- its pieces

    @abstractmethod
    def make_layer(self, config: PreTrainedConfig) -> nn.Module:
        """One more layer of this architecture, for a local head."""

    @abstractmethod
    def embed(self, plain: nn.Module, **inputs) -> torch.Tensor:
        """The hidden states that enter the first layer."""

    @abstractmethod
    def run_layer(
        self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None, **attention
    ) -> torch.Tensor:
        """One layer. With no modulation, or one at its start, this is the stock layer, bit for bit.

        `attention` holds what the stock layer takes besides hidden states (masks, positions, cache, conditions).
        """

    @abstractmethod
    def read_out(self, plain: nn.Module, hidden: torch.Tensor, **conditions) -> torch.Tensor:
        """What the stock model makes of its last hidden states: final norm and head."""


def may_look(plain: nn.Module, attention_mask: torch.Tensor | None) -> bool:
    """Whether Transformers may look if a mask hides anything, to leave it out where not: a training step would wait for an
    accelerator to say so."""
    return attention_mask is None or attention_mask.device.type == "cpu" or not plain.training


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


#: `model_type` of a plain config -> its backbone.
BACKBONES: dict[str, Backbone] = {}


def register_backbone(backbone: Backbone) -> None:
    """Add an architecture to those that can be converted."""
    BACKBONES[backbone.model_type] = backbone


def backbone_for(config: PreTrainedConfig) -> Backbone:
    """The backbone of a plain model's config.

    Raises:
        ValueError: the architecture is not supported (lists those that are), or not with this config.
    """
    if config.model_type not in BACKBONES:
        raise ValueError(f"model_type={config.model_type!r} is not supported; supported: {_supported()}")
    backbone = BACKBONES[config.model_type]
    backbone.check(config)
    return backbone


def backbone_of(plain: nn.Module) -> Backbone:
    """The backbone of a stock model, of Transformers or of another library.

    Raises:
        ValueError: as [`backbone_for`] and [`backbone_named`].
    """
    if isinstance(plain, PreTrainedModel):
        return backbone_for(plain.config)
    return backbone_named(type(plain).__name__)


def backbone_named(plain_name: str) -> Backbone:
    """The backbone of a stock class, by the name of that.

    Raises:
        ValueError: it is not supported (lists what is).
    """
    for backbone in BACKBONES.values():
        if backbone.plain_name == plain_name:
            return backbone
    raise ValueError(
        f"{plain_name} cannot be cut into blocks; supported: {_supported()}. (A U-Net, or a stack with long skips, hands on "
        "more than what leaves a layer; a stack of two kinds of layers has no blocks that are alike.)"
    )


def _supported() -> str:
    return ", ".join(f"{backbone.model_type} ({backbone.plain_name})" for backbone in BACKBONES.values())
