"""What the core has to know of an architecture. A new one is one subclass, in a file of its own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .modulation import Modulation


class Backbone(ABC):
    """One architecture: which stock HF model it is, and how to run it piece by piece.

    A backbone holds no weights and patches nothing: it calls the sub-modules of the stock model in HF's own
    order. Hidden states are `[N, S, D]`. Wherever a method takes the stock model, a [`Parts`] of it will do.
    """

    model_type: ClassVar[str]  #: `model_type` of the plain model's config
    task: ClassVar[str]  #: the task it is converted for
    plain_class: ClassVar[type[PreTrainedModel]]  #: the stock model that is converted
    layers_path: ClassVar[str]  #: path of its list of layers, for example "vit.layers"
    embedding_paths: ClassVar[Sequence[str]]  #: paths of what `embed` uses
    noisy_embedding_paths: ClassVar[Sequence[str]] = ()  #: paths of those of them that noisy tokens need, too
    readout_paths: ClassVar[Sequence[str]]  #: paths of what `read_out` uses
    lora_targets: ClassVar[Sequence[str]] = ("q_proj", "v_proj")  #: what LoRA adapts in a layer, if not told

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError if this config asks for something that cannot be cut into blocks."""

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

        `attention` holds what the stock attention module takes besides the hidden states (masks, positions, cache).
        """

    @abstractmethod
    def read_out(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the stock model makes of its last hidden states: final norm and head, to logits."""


class Parts(nn.Module):
    """Copies of some of a stock model's parts under their own paths, for a block that shares them with no other."""

    def __init__(self, plain: PreTrainedModel, paths: Sequence[str]):
        super().__init__()
        for path in paths:
            *parents, name = path.split(".")
            node: nn.Module = self
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = node.get_submodule(parent)
            node.add_module(name, copy.deepcopy(plain.get_submodule(path)))
