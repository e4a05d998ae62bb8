"""The walk: from pure noise at sigma_max down the inference levels, one denoiser evaluation a level.

Knows no model: a denoiser is any function `(z, step) -> logits`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .gaussian import ancestral_step, euler_step
from .randomness import Noise


def walk(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    targets: torch.Tensor,
    sigmas: torch.Tensor,
    noise: Noise,
    sampler: str,
    bridge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk from `z ~ N(0, sigma_max^2 I)` down `sigmas`.

    Args:
        denoise: `(z [N, D], step) -> logits [N, V]`, at the noise level `sigmas[step]`.
        targets: the known vectors e_v, `[V, D]`.
        sigmas: `[T+1]` descending levels; the last is not evaluated.
        noise: where draws come from; its rows are the N.
        sampler: "euler" (probability-flow ODE with the bridge's estimate; the paper's) or "ancestral" (exact
            posterior sampling, needs no bridge).
        bridge: `(logits, targets) -> [N, D]`, how logits become a point of the target space.

    Returns:
        `logits [N, V]` of the last evaluation, and `z [N, D]` at the last level, sigma_min.
    """
    levels = sigmas.tolist()
    z = levels[0] * noise.normal(targets.shape[-1])
    for step, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:])):
        logits = denoise(z, step)
        z = walk_on(z, logits, targets, sigma, sigma_next, noise, sampler, bridge)
    return logits, z


def walk_on(
    z: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    sigma: float,
    sigma_next: float,
    noise: Noise,
    sampler: str,
    bridge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One step of [`walk`]: `z [N, D]` at `sigma_next`, of that at `sigma` and its logits. Rows do not meet."""
    if sampler == "euler":
        return euler_step(z, bridge(logits, targets), sigma, sigma_next)
    target = F.embedding(noise.categorical(logits), targets).float()
    return ancestral_step(z, target, sigma, sigma_next, noise.normal(targets.shape[-1]))
