"""The loss of a plain model of text, read out in parts as ours is: memory and time compare fairly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..backbones.stock_run import base_of, head_of
from ..diffusion.objectives import chunked_cross_entropy
from ..tasks import backbone_for


def mean_cross_entropy(
    model: PreTrainedModel, task: str, labels: torch.Tensor, scored: Callable[[torch.Tensor], torch.Tensor], **inputs
) -> torch.Tensor:
    """The mean cross-entropy of some tokens.

    Args:
        task: as in `pipeline(task)`.
        labels: `[R]`, of these tokens.
        scored: `[N, S, D]`, what the head reads, to what it reads of them, `[N, R / N, D]`.
        inputs: what the plain model takes.
    """
    backbone = backbone_for(model.config, task)
    layers_path = backbone.layers_path(model, backbone.num_layers(model.config))
    base = base_of(model, layers_path)
    hidden = scored(base(**inputs).last_hidden_state).flatten(0, 1)
    head = [parameter for module in model.children() if module is not base for parameter in module.parameters()]
    with head_of(model, layers_path) as read:
        vocab_size = model.config.get_text_config().vocab_size
        total = chunked_cross_entropy(read, [hidden], labels, list(dict.fromkeys(head)), vocab_size)
    return total / len(hidden)
