"""The row of masked diffusion in the table of tasks."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from ...presets import PRESETS
from ...processors import load_tokenizer
from ...tasks import OF_TEXT, Generation, Task, stock_class
from ...whole_numbers import is_whole
from ..plain_text import mean_cross_entropy
from .command import MaskedTextOptions, generate
from .model import DiffusionBlocksForMaskedLM


def settle(config: PreTrainedConfig) -> None:
    """Say which token is MASK; without one there is a new one after the vocabulary's last. A decoder is told to attend both
    ways.

    Raises:
        ValueError: `mask_token_id` is beyond that.
    """
    source = config.source_config
    if stock_class(AutoModelForMaskedLM, source) is None:
        source.is_causal = False
    if config.mask_token_id is None:
        config.mask_token_id = getattr(source, "mask_token_id", None)
    text = source.get_text_config()
    size, found = text.vocab_size, config.mask_token_id
    if found is None:
        config.mask_token_id = found = size
    if not is_whole(found, 0) or found > size:
        raise ValueError(f"mask_token_id={found!r} must lie in 0..{size - 1}, or be {size}, or None, for a new token")
    source.mask_token_id, text.vocab_size = found, max(size, found + 1)


def fields_of_source(source: str, **hub) -> dict[str, int]:
    """The MASK of the tokenizer that is saved with a model, if there is one."""
    try:
        found = load_tokenizer(source, **hub).mask_token_id
    except OSError:
        found = None
    return {} if found is None else {"mask_token_id": found}


def example(config: PreTrainedConfig, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
    """Random tokens `[N, S]`, which are their own labels; no MASK where the config names it."""
    size, mask = config.get_text_config().vocab_size, getattr(config, "mask_token_id", None)
    tokens = torch.randint(size - 1, (num_rows, sequence_length))
    tokens += tokens >= (size if mask is None else mask)
    return {"input_ids": tokens, "labels": tokens}


def plain_loss(model: PreTrainedModel, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of half of a plain model's tokens, as if they were masked."""
    half, task = labels.shape[1] // 2, DiffusionBlocksForMaskedLM.task
    targets = labels[:, :half].flatten()
    return mean_cross_entropy(model, task, targets, lambda hidden: hidden[:, :half], **inputs, is_causal=False)


#: Fields of the formulation, and their defaults.
MASKS = {"mask_token_id": None, "overlap": 0.1, "num_inference_steps": None, "inference_seed": 0}
FILL_MASK = Task(
    name=DiffusionBlocksForMaskedLM.task,
    model_class=DiffusionBlocksForMaskedLM,
    auto_class=AutoModelForMaskedLM,
    stock_auto_classes=(AutoModelForMaskedLM, AutoModelForCausalLM),
    example=example,
    plain_loss=plain_loss,
    **OF_TEXT,
    usage='fill = pipeline("fill-mask", model={name})\nfill(f"Once upon a {{fill.tokenizer.mask_token}}.")',
    formulations=dict.fromkeys(PRESETS, MASKS),
    evaluation=dict.fromkeys(
        PRESETS,
        "`model(...).logits` are those of the block that owns the text's share of masked tokens; MASK is never an answer.",
    ),
    generation=Generation(MaskedTextOptions, generate),
    settle=settle,
    fields_of_source=fields_of_source,
)
