"""The row of masked diffusion in the table of tasks."""

from __future__ import annotations

import torch
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from ...backbones.base import backbone_for
from ...backbones.decoder import Decoder
from ...backbones.encoder import Encoder
from ...diffusion.objectives import chunked_sum, cross_entropy
from ...presets import PRESETS
from ...processors import load_tokenizer
from ...tasks import Generation, Task
from ...whole_numbers import is_whole
from .command import MaskedTextOptions, generate
from .model import DiffusionBlocksForMaskedLM


def settle(config: PreTrainedConfig) -> None:
    """Say which token is MASK; without one there is a new one after the vocabulary's last.

    Raises:
        ValueError: `mask_token_id` is beyond that.
    """
    source = config.source_config
    if config.mask_token_id is None:
        config.mask_token_id = getattr(source, "mask_token_id", None)
    size, found = source.vocab_size, config.mask_token_id
    if found is None:
        config.mask_token_id = found = size
    if not is_whole(found, 0) or found > size:
        raise ValueError(f"mask_token_id={found!r} must lie in 0..{size - 1}, or be {size}, or None, for a new token")
    source.mask_token_id, source.vocab_size = found, max(size, found + 1)


def fields_of_source(source: str, **hub) -> dict[str, int]:
    """The MASK of the tokenizer that is saved with a model, if there is one."""
    try:
        found = load_tokenizer(source, **hub).mask_token_id
    except OSError:
        found = None
    return {} if found is None else {"mask_token_id": found}


def example(config: PreTrainedConfig, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
    """Random tokens `[N, S]`, which are their own labels; no MASK where the config names it."""
    tokens = torch.randint(config.vocab_size - 1, (num_rows, sequence_length))
    mask = getattr(config, "mask_token_id", None)
    tokens += tokens >= (config.vocab_size if mask is None else mask)
    return {"input_ids": tokens, "labels": tokens}


def plain_loss(model: PreTrainedModel, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of half of a plain model's tokens, as if they were masked, read out in chunks as ours is."""
    architecture = backbone_for(model.config)
    hidden = model.base_model(**inputs, is_causal=False).last_hidden_state
    half = labels.shape[1] // 2

    def loss_of_rows(hidden, targets):
        return cross_entropy(architecture.head(model, hidden).float(), targets).sum()

    rows = [hidden[:, :half].flatten(0, 1), labels[:, :half].flatten()]
    head = [p for module in model.children() if module is not model.base_model for p in module.parameters()]
    return chunked_sum(loss_of_rows, rows, list(dict.fromkeys(head)), model.config.vocab_size) / len(rows[0])


#: Fields of the formulation, and their defaults.
MASKS = {"mask_token_id": None, "overlap": 0.1, "num_inference_steps": None, "inference_seed": 0}
FILL_MASK = Task(
    name=DiffusionBlocksForMaskedLM.task,
    model_class=DiffusionBlocksForMaskedLM,
    auto_class=AutoModelForMaskedLM,
    backbones=(Decoder, Encoder),
    example=example,
    num_positions=lambda config, sequence_length: sequence_length,
    takes_sequence_length=True,
    plain_loss=plain_loss,
    processor="tokenizer",
    load_processor=load_tokenizer,
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
