"""One denoising step: EDM preconditioning, readouts, bridges, and the steps of the two samplers.

Pure functions of tensors. `N` is the batch, `V` the number of classes (or tokens), `D` the width of the
target embeddings. Sources: EDM (arXiv 2206.00364), table 1; DiffusionBlocks (arXiv 2506.14202), appendix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


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


def posterior_logits(
    prior_logits: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Bayes' rule for a categorical target: `p(v | x, z) ∝ p(v | x) exp((<z, e_v> - ||e_v||^2 / 2) / sigma^2)`.

    The likelihood is that of `z = e_v + sigma noise`, without what does not depend on v. At sigma_min it reaches 1e5, so
    it is computed in float32, outside autocast. (A matrix product: the distances themselves would cost V x D operations
    a row that no fast kernel does.)

    Args:
        prior_logits: the network's `f(x, ...)`, `[N, V]`.
        z: noisy targets `[N, D]`.
        sigma: noise levels `[N]`; at infinity z says nothing, and the prior is returned.
        targets: the known vectors e_v, `[V, D]`.

    Returns:
        `[N, V]` float32: the network has only the prior left to learn, whatever the noise level.
    """
    with torch.autocast(z.device.type, enabled=False):
        precision, targets = sigma.float() ** -2, targets.float()
        half_norms = torch.linalg.vector_norm(targets, dim=-1) ** 2 / 2
        # Added where the product is made, and in place: with a large vocabulary every pass over logits counts.
        logits = torch.addmm(prior_logits.float(), z.float() * precision[:, None], targets.T)
        return logits.addr_(precision, half_norms, alpha=-1)


def soft_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The expected target under softmax(logits), `[N, D]`: the posterior mean. Shrinks where the model is unsure."""
    return logits.float().softmax(-1) @ targets.float()


def hard_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The most likely target, `[N, D]`."""
    return F.embedding(logits.argmax(-1), targets).float()


BRIDGES = {"soft": soft_bridge, "hard": hard_bridge}


def euler_step(z: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """One Euler step down the probability-flow ODE: `a z + (1 - a) D` with `a = sigma_next / sigma`.

    (The paper's appendix prints the opposite sign; this one moves towards D.)
    """
    ratio = sigma_next / sigma
    return ratio * z + (1 - ratio) * denoised


def ancestral_step(
    z: torch.Tensor, target: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor
) -> torch.Tensor:
    """Draw from `q(z_next | z, target)`, the exact reverse of the noising process for a known target `[N, D]`.

    `N(r z + (1 - r) target, sigma_next^2 (1 - r) I)` with `r = sigma_next^2 / sigma^2`. With the target drawn
    from an exact posterior, the walk samples exactly, at any number of steps.
    """
    ratio = (sigma_next / sigma) ** 2
    return ratio * z + (1 - ratio) * target + sigma_next * (1 - ratio) ** 0.5 * noise
