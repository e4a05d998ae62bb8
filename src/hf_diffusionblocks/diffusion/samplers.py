"""From pure noise at sigma_max down the inference levels: the walk to a categorical target, one of V known vectors, which
logits become a point among by a bridge; and the flow to a point.

They know no model: a denoiser is any function of z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .gaussian import euler_step


def walk(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    targets: torch.Tensor,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    bridge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk from `z ~ N(0, sigma_max^2 I)` down `sigmas`, by Euler's method.

    Args:
        denoise: `(z [N, D], step) -> logits [N, V]`, at the noise level `sigmas[step]`.
        targets: the known vectors e_v, `[V, D]`.
        sigmas: `[T+1]` descending levels; the last is not evaluated.
        noise: that it starts from, standard normal `[N, D]`.
        bridge: `(logits, targets) -> [N, D]`, how logits become a point of the target space.

    Returns:
        `logits [N, V]` of the last evaluation, and `z [N, D]` at the last level, sigma_min.
    """
    levels = sigmas.tolist()
    z = levels[0] * noise
    for step, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:])):
        logits = denoise(z, step)
        z = euler_step(z, bridge(logits, targets), sigma, sigma_next)
    return logits, z


def flow_on(
    denoise: Callable[[torch.Tensor, float], torch.Tensor], z: torch.Tensor, sigma: float, sigma_next: float, order: int
) -> torch.Tensor:
    """One step down the probability-flow ODE, where the estimate is a point.

    Args:
        denoise: `(z, sigma) -> D`, like z.
        z: at `sigma`.
        order: 1 is Euler's method; 2 is Heun's, which evaluates at `sigma_next`, too (EDM, arXiv 2206.00364, algorithm 1).

    Returns:
        z at `sigma_next`.
    """
    estimate = denoise(z, sigma)
    z_next = euler_step(z, estimate, sigma, sigma_next)
    if order == 1:
        return z_next
    slope, slope_next = (z - estimate) / sigma, (z_next - denoise(z_next, sigma_next)) / sigma_next
    return z + (sigma_next - sigma) * (slope + slope_next) / 2


def soft_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The expected target under softmax(logits), `[N, D]`: the posterior mean. Shrinks where the model is unsure."""
    return logits.float().softmax(-1) @ targets.float()


def hard_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The most likely target, `[N, D]`."""
    return F.embedding(logits.argmax(-1), targets).float()
