"""Blocks that start from one: all of a block-wise model from a trained model of one block's depth."""

from __future__ import annotations

import re

from torch import nn

#: The number of a layer in the name of a parameter.
LAYER = re.compile(r"(?<=layers\.|blocks\.)\d+")
#: What the name of a block's own end begins with, where the first block's begins with that of the plain model.
OWN_END = re.compile(r"^block_(?:embeddings|readouts)\.\d+")


def copy_to_every_block(one: nn.Module, model: nn.Module, depth: int) -> None:
    """Give each block of a model, and its own ends if it has any, the weights of a model of one block and `depth` layers."""
    weights = one.state_dict()

    def source(name: str) -> str:
        name = OWN_END.sub(model.base_model_prefix, name)
        return LAYER.sub(lambda number: str(int(number.group()) % depth), name, count=1)

    model.load_state_dict({name: weights[source(name)] for name in model.state_dict()})
