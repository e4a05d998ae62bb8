"""The likelihood bound of a text model's diffusion, in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from ...diffusion.objectives import IGNORED, LikelihoodTerms, chunks
from ..base import DiffusionBlocksPreTrainedModel


def likelihood_terms(
    model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor], num_samples: int, generator: torch.Generator
) -> LikelihoodTerms:
    """For posterior mean D and targets e of norm 1, a token costs at most
    `1/(2 sigma_max^2) + E[-ln p(v | x, z_sigma_min)] + integral of E||e - D||^2 sigma^-2 over ln sigma`, where each
    block answers for its own disjoint interval (Kingma et al. 2021, arXiv 2107.00630, for unit-variance Gaussians).

    Args:
        num_samples: noise levels a sequence, shared out evenly over the blocks (at least one each), stratified in ln
            sigma within each block's interval.
        generator: of levels and noise.
    """
    config, labels = model.config, batch["labels"]
    at_the_end = torch.full((len(labels),), config.sigma_min)
    last_block = int(model.noise_schedule.block_of(config.sigma_min))
    reconstruction = _sum_of_rows(model, last_block, batch, at_the_end, generator, _cross_entropy)
    diffusion = torch.zeros_like(reconstruction)
    strata = max(1, num_samples // config.num_blocks)
    for block in model.blocks:
        low, high = map(math.log, model.noise_schedule.interval(block.index))
        width = (high - low) / strata
        for stratum in range(strata):
            uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64)
            sigma = (low + (stratum + uniform) * width).exp()
            error = _sum_of_rows(model, block.index, batch, sigma, generator, _squared_error)
            diffusion += width * error / sigma.to(error.device) ** 2
    tokens = (labels[:, 1:] != IGNORED).sum(1).double()
    return LikelihoodTerms(tokens.cpu(), 1 / (2 * config.sigma_max**2), reconstruction.cpu(), diffusion.cpu())


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _squared_error(logits: torch.Tensor, targets: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) @ vectors - vectors[targets]).square().sum(-1)


def _sum_of_rows(
    model, block_index: int, batch: Mapping, sigma: torch.Tensor, generator: torch.Generator, measure: Callable
) -> torch.Tensor:
    """A measure of one block's denoising at `sigma [N]`, summed over the labelled tokens of each sequence; `[N]`."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    targets, block = batch["labels"][:, 1:], model.blocks[block_index]
    noise = {"sigma": sigma, "noise": None, "generator": generator}
    rows = [each.flatten(0, 1) for each in model.formulation.train(block, batch, targets, None, noise)[1]]
    targets, values = targets.flatten(), torch.zeros(targets.numel(), dtype=torch.float64, device=model.device)
    vectors = model.target_vectors()
    for part in chunks(len(targets), model.config.vocab_size, targets.device):
        logits = model.formulation.logits(block, *[each[part] for each in rows])
        values[part] = measure(logits, targets[part].clamp(min=0), vectors).double()
    values[targets == IGNORED] = 0
    return values.unflatten(0, (len(batch["labels"]), -1)).sum(1)
