"""What a block is shown, and how it is read out: `config.preset`, as an object."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Formulation:
    """A formulation of one task. Its subclasses have the methods that their task's model calls.

    Args:
        model: whose blocks.
    """

    modulated: ClassVar[bool] = False  #: whether sigma modulates the layers (AdaLN)
    passes_on: ClassVar[bool] = False  #: whether what leaves a block is what the next starts from
    runs_stock: ClassVar[bool] = False  #: whether the stock model's own forward runs a block; else it runs piece by piece

    def __init__(self, model: nn.Module):
        self.model = model
