"""The walk: from pure noise at sigma_max down the inference levels, one denoiser evaluation a level.

Knows no model: a denoiser is any function `(z, step) -> logits`.
"""

from __future__ import annotations

from collections.abc import Callable
import torch
from torch.nn import functional as F

from .denoising import ancestral_step, euler_step


class NoiseSource:
    """Where the walk's randomness comes from; never the global generator.

    Without a `generator` the noise is *keyed*: a function of the seed alone, equal for every row, so that a row's
    prediction does not depend on what it is batched with, and repeats exactly. With one, each row draws its own.
    """

    def __init__(self, num_rows: int, seed: int, generator: torch.Generator | None, device: torch.device):
        self.num_rows, self.device = num_rows, device
        self.keyed = generator is None
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator

    def _draw(self, draw: Callable, shape: tuple[int, ...]) -> torch.Tensor:
        rows = 1 if self.keyed else self.num_rows
        values = draw((rows, *shape), generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return values.to(self.device).expand(self.num_rows, *shape)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal `[N, *shape]`."""
        return self._draw(torch.randn, shape)

    def categorical(self, logits: torch.Tensor) -> torch.Tensor:
        """One class a row, drawn from softmax(logits `[N, V]`) by inverting its CDF; `[N]`."""
        cumulative = logits.double().softmax(-1).cumsum(-1)
        uniform = self._draw(torch.rand, (1,)).double() * cumulative[:, -1:]
        return torch.searchsorted(cumulative, uniform.contiguous(), right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def walk(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    targets: torch.Tensor,
    sigmas: torch.Tensor,
    noise: NoiseSource,
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
    width = targets.shape[-1]
    z = levels[0] * noise.normal(width)
    for step, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:])):
        logits = denoise(z, step)
        if sampler == "euler":
            z = euler_step(z, bridge(logits, targets), sigma, sigma_next)
        else:
            target = F.embedding(noise.categorical(logits), targets).float()
            z = ancestral_step(z, target, sigma, sigma_next, noise.normal(width))
    return logits, z
