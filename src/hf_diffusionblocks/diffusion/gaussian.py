"""The Gaussian process: how a target is noised, how a network that undoes it is conditioned, how a sampler steps back.

Pure functions of tensors. `N` is the batch, `D` the width of the target. Sources: EDM (arXiv 2206.00364), table 1;
DiffusionBlocks (arXiv 2506.14202), appendix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .randomness import Generators, draw


class Preconditioning(NamedTuple):
    """EDM's four coefficients, each shaped like sigma."""

    skip: torch.Tensor
    out: torch.Tensor
    input: torch.Tensor
    noise: torch.Tensor


def precondition(sigma: torch.Tensor, sigma_data: float) -> Preconditioning:
    """EDM table 1: the estimate is `D = skip * z + out * F(input * z, noise, x)`."""
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data * total.rsqrt(),
        input=total.rsqrt(),
        noise=sigma.log() / 4,
    )


def edm_loss_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """EDM's `w(sigma) = (sigma^2 + sd^2) / (sigma sd)^2`, one weight per sample. Meant for L2 targets."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def corrupt(
    y: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor | None = None, generator: Generators = None
) -> torch.Tensor:
    """`z = y + sigma eps` for targets `[..., D]` and levels `[...]`; eps is `noise`, standard normal, or drawn."""
    if noise is None:
        noise = draw(torch.randn, tuple(y.shape), generator, y.device)
    return y + sigma[..., None] * noise.to(y.device, torch.float32)


def euler_step(z: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """One Euler step down the probability-flow ODE: `a z + (1 - a) D` with `a = sigma_next / sigma`.

    (The paper's appendix prints the opposite sign; this one moves towards D.)
    """
    ratio = sigma_next / sigma
    return ratio * z + (1 - ratio) * denoised
