"""What the core has to know of an architecture. A new one is one subclass, in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..conditioning import Modulation


class Backbone(ABC):
    """One architecture: which stock HF model it is, and how to run it piece by piece.

    A backbone holds no weights and patches nothing: it calls the sub-modules of the stock model in HF's own
    order. Hidden states are `[N, S, D]`.
    """

    model_type: ClassVar[str]  #: `model_type` of the plain model's config
    task: ClassVar[str]  #: the task it is converted for
    plain_class: ClassVar[type[PreTrainedModel]]  #: the stock model that is converted
    layers_path: ClassVar[str]  #: path of its list of layers, for example "vit.layers"

    @abstractmethod
    def make_layer(self, config: PreTrainedConfig) -> nn.Module:
        """One more layer of this architecture, for a local head."""

    @abstractmethod
    def embed(self, plain: PreTrainedModel, **inputs) -> torch.Tensor:
        """The hidden states that enter the first layer."""

    @abstractmethod
    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, modulation: Modulation | None) -> torch.Tensor:
        """One layer. With no modulation, or one at its start, this is the stock layer, bit for bit."""

    @abstractmethod
    def read_out(self, plain: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """What the stock model makes of its last hidden states: final norm and head, to logits."""
