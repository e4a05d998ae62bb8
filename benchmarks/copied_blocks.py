"""Blocks that start from one: all of a block-wise model from a trained model of one block's depth."""

from __future__ import annotations

import re

from torch import nn

#: The number of a layer in the name of a parameter.
LAYER = re.compile(r"(?<=layers\.|blocks\.)\d+")


def copy_to_every_block(one: nn.Module, model: nn.Module, depth: int) -> None:
    """Give each block of a model the weights of a model of one block, which has `depth` layers; ends must be shared."""
    weights = one.state_dict()
    model.load_state_dict({
        name: weights[LAYER.sub(lambda number: str(int(number.group()) % depth), name, count=1)]
        for name in model.state_dict()
    })  # fmt: skip
