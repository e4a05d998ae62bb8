"""A likelihood bound for the diffusion itself: what a text model's denoisers say together of each token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..diffusion.objectives import rows_per_chunk
from ..models import DiffusionBlocksForCausalLM
from ..models.base import without_dropout
from ..models.causal_lm.model import IGNORED


@dataclass
class LikelihoodBound:
    """An upper bound of `-ln p(token | tokens before)` under the continuous stochastic sampler, and its parts.

    Args:
        nats_per_token: the bound's estimate: the sum of the three parts.
        standard_error: of that estimate, over sequences.
        prior, reconstruction, diffusion: the parts, in nats a token.
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
    model: DiffusionBlocksForCausalLM, dataloader: Iterable[dict], num_samples: int = 8, seed: int = 0
) -> LikelihoodBound:
    """Estimate the diffusion's likelihood bound.

    For posterior mean D and targets e of norm 1, a token costs at most
    `1/(2 sigma_max^2) + E[-ln p(v | x, z_sigma_min)] + integral of E||e - D||^2 sigma^-2 over ln sigma`, where each
    block answers for its own disjoint interval. It bounds the continuous sampler with this D (Kingma et al. 2021,
    arXiv 2107.00630, for unit-variance Gaussians), neither a walk of few steps nor `model(...).logits`.

    Args:
        model: of text.
        dataloader: batches with `input_ids`, `labels` and, if padded, `attention_mask`.
        num_samples: noise levels a sequence, shared out evenly over the blocks (at least one each), stratified in ln
            sigma within each block's interval.
        seed: of levels and noise.

    Raises:
        TypeError: the model is not one of text.
        ValueError: nothing in the data has a label.
    """
    if not isinstance(model, DiffusionBlocksForCausalLM):
        raise TypeError(f"model={type(model).__name__} must be a DiffusionBlocksForCausalLM")
    generator = torch.Generator().manual_seed(seed)
    with without_dropout(model):
        parts = [_bound_of_batch(model, batch, num_samples, generator) for batch in dataloader]
    tokens, reconstruction, diffusion = (torch.cat(column) for column in zip(*parts)) if parts else [torch.zeros(1)] * 3
    total = tokens.sum()
    if not total:
        raise ValueError("dataloader has no labelled token: there is nothing to score")
    prior = 1 / (2 * model.config.sigma_max**2)
    mean = (reconstruction + diffusion).sum() / total
    residual = reconstruction + diffusion - mean * tokens  # a ratio estimator: sequences may differ in length
    return LikelihoodBound(
        nats_per_token=prior + mean.item(),
        standard_error=(residual.square().sum().sqrt() / total).item(),
        prior=prior,
        reconstruction=(reconstruction.sum() / total).item(),
        diffusion=(diffusion.sum() / total).item(),
        num_tokens=int(total),
    )


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Nats a token to bits a byte of text; `num_bytes` is the UTF-8 length of what the scored tokens spell."""
    return nats_per_token * num_tokens / (math.log(2) * num_bytes)


def _bound_of_batch(
    model: DiffusionBlocksForCausalLM, batch: dict, num_samples: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labelled tokens, and summed nats of the two parts that need the model, of each sequence `[N]`; float64."""
    config, schedule = model.config, model.noise_schedule
    labels = batch["labels"]
    at_the_end = torch.full((len(labels),), config.sigma_min)
    last_block = int(schedule.block_of(config.sigma_min))
    reconstruction = _sum_of_rows(model, last_block, batch, at_the_end, generator, _cross_entropy)
    diffusion = torch.zeros_like(reconstruction)
    strata = max(1, num_samples // config.num_blocks)
    for block in range(config.num_blocks):
        low, high = map(math.log, schedule.interval(block))
        width = (high - low) / strata
        for stratum in range(strata):
            uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64)
            sigma = (low + (stratum + uniform) * width).exp()
            error = _sum_of_rows(model, block, batch, sigma, generator, _squared_error)
            diffusion += width * error / sigma.to(error.device) ** 2
    tokens = (labels[:, 1:] != IGNORED).sum(1).double()
    return tokens.cpu(), reconstruction.cpu(), diffusion.cpu()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _squared_error(logits: torch.Tensor, targets: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) @ vectors - vectors[targets]).square().sum(-1)


def _sum_of_rows(model, block: int, batch: dict, sigma: torch.Tensor, generator, measure) -> torch.Tensor:
    """A measure of one block's denoising at `sigma [N]`, summed over the labelled tokens of each sequence; `[N]`."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    rows, targets = model.noised_rows(
        block,
        {"input_ids": batch["input_ids"], "inputs_embeds": None},
        batch.get("attention_mask"),
        batch.get("position_ids"),
        batch["labels"],
        sigma,
        None,
        generator,
    )
    vectors, size = model.target_vectors(), rows_per_chunk(len(targets), model.config.vocab_size)
    values = torch.zeros(len(targets), dtype=torch.float64, device=model.device)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        chunk = type(rows)(*(tensor if tensor is None else tensor[part] for tensor in rows))
        logits = model.denoise(block, chunk, vectors)
        values[part] = measure(logits, targets[part].clamp(min=0), vectors).double()
    values[targets == IGNORED] = 0
    return values.unflatten(0, (len(sigma), -1)).sum(1)
