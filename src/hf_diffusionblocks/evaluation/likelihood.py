"""A likelihood bound for the diffusion itself: what a text model's denoisers say together of each token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..backbones.stock_run import without_dropout
from ..models.base import DiffusionBlocksPreTrainedModel
from ..whole_numbers import whole


@dataclass
class LikelihoodBound:
    """An upper bound of the negative log-likelihood of a token under the task's sampler, and its parts.

    Args:
        nats_per_token: the bound's estimate: the sum of the three parts.
        standard_error: of that estimate, over sequences; nan of a single one, which does not show it.
        prior, reconstruction, diffusion: the parts, in nats a token; masked text has the last alone.
        num_tokens: tokens scored.
    """

    nats_per_token: float
    standard_error: float
    prior: float
    reconstruction: float
    diffusion: float
    num_tokens: int


@torch.no_grad()
def nll_bound(
    model: DiffusionBlocksPreTrainedModel, dataloader: Iterable[dict], num_samples: int = 8, seed: int = 0
) -> LikelihoodBound:
    """Estimate the diffusion's likelihood bound.

    It bounds the sampler that a task names (of next tokens, the continuous stochastic one; of masked text, one token a
    step in random order), neither one of fewer steps nor `model(...).logits`; each block answers for its own range of
    noise levels.

    Args:
        model: of text.
        dataloader: batches with `input_ids`, `labels` and, if padded, `attention_mask`.
        num_samples: noise levels a sequence: shared out evenly over the blocks (at least one each), stratified in ln sigma
            within each block's interval; or, of masked text, counts of masked tokens, stratified.
        seed: of levels and noise.

    Raises:
        TypeError: the model is not one of text, or a batch no mapping to tensors.
        ValueError: a batch has no labels, or all of them none that counts; or num_samples is no whole number from 1.
    """
    if not hasattr(model, "likelihood_terms"):
        raise TypeError(f"model={type(model).__name__} must be of text: there is no likelihood bound for other tasks")
    num_samples = whole("num_samples", num_samples, 1)
    generator = torch.Generator().manual_seed(seed)
    with without_dropout(model):
        terms = [model.likelihood_terms(_checked(batch), num_samples, generator) for batch in dataloader]
    if not any(of_batch.tokens.any() for of_batch in terms):
        raise ValueError("dataloader has no labelled token: there is nothing to score")
    tokens, reconstruction, diffusion = (
        torch.cat([getattr(of_batch, name) for of_batch in terms]) for name in ("tokens", "reconstruction", "diffusion")
    )
    prior, total = terms[0].prior, tokens.sum()
    mean = (reconstruction + diffusion).sum() / total
    residual = reconstruction + diffusion - mean * tokens  # a ratio estimator: sequences may differ in length
    several = bool((tokens > 0).sum() > 1)
    return LikelihoodBound(
        nats_per_token=prior + mean.item(),
        standard_error=(residual.square().sum().sqrt() / total).item() if several else math.nan,
        prior=prior,
        reconstruction=(reconstruction.sum() / total).item(),
        diffusion=(diffusion.sum() / total).item(),
        num_tokens=int(total),
    )


def _checked(batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"dataloader gives a {type(batch).__name__}, and must give batches: dicts of tensors [N, S]")
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"dataloader gives batches of {', '.join(map(repr, batch))}, and {name!r} must be among them")
    for name, value in batch.items():
        if not torch.is_tensor(value):
            raise TypeError(
                f"dataloader gives {name!r} as a {type(value).__name__}, and must give tensors: transformers' "
                "default_data_collator makes them of rows"
            )
    if batch["labels"].shape != batch["input_ids"].shape or batch["labels"].dim() != 2:
        shapes = " and ".join(f"{name} of {list(batch[name].shape)}" for name in ("input_ids", "labels"))
        raise ValueError(f"dataloader gives {shapes}, which must both be [N, S]")
    return batch


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Nats a token to bits a byte of text; `num_bytes` is the UTF-8 length of what the scored tokens spell.

    Raises:
        ValueError: there are no tokens or bytes.
    """
    num_tokens, num_bytes = whole("num_tokens", num_tokens, 1), whole("num_bytes", num_bytes, 1)
    return nats_per_token * num_tokens / (math.log(2) * num_bytes)
