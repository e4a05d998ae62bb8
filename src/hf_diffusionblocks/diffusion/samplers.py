"""The walk: from pure noise at sigma_max down the inference levels, one denoiser evaluation a level.

Knows no model: a denoiser is any function `(z, step) -> logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
import numpy as np
import torch
from torch.nn import functional as F

from .gaussian import ancestral_step, euler_step


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
        return _invert_cdf(logits, self._draw(torch.rand, (1,)))


PAGE = 64  # positions whose noise is drawn together


@lru_cache(maxsize=256)
def _page_of_noise(draw: Callable, seed: int, draw_index: int, page: int, width: int) -> torch.Tensor:
    key = np.random.SeedSequence([seed, draw_index, page]).generate_state(1, np.uint64)[0]
    return draw((PAGE, width), generator=torch.Generator().manual_seed(int(key)))


class PositionNoise:
    """Noise keyed by seed and token position, the same for every row of a batch: cached and uncached generation, and
    prompts padded to any length, meet the same.

    Has the methods of [`NoiseSource`]; the n-th call of either gives the n-th draw of each position.
    """

    def __init__(self, positions: torch.Tensor, seed: int):
        self.positions, self.seed, self.draws = positions.tolist(), seed, 0
        self.device = positions.device

    def _draw(self, draw: Callable, width: int) -> torch.Tensor:
        numbers = {position // PAGE for position in self.positions}
        pages = {number: _page_of_noise(draw, self.seed, self.draws, number, width) for number in numbers}
        values = torch.stack([pages[position // PAGE][position % PAGE] for position in self.positions])
        self.draws += 1
        return values.to(self.device)

    def normal(self, width: int) -> torch.Tensor:
        """Standard normal `[N, width]`."""
        return self._draw(torch.randn, width)

    def categorical(self, logits: torch.Tensor) -> torch.Tensor:
        """One class a row, drawn from softmax(logits `[N, V]`); `[N]`."""
        return _invert_cdf(logits, self._draw(torch.rand, 1))


def _invert_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The class at `uniform [N, 1]` of the CDF of softmax(logits `[N, V]`); `[N]`."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = (uniform.double() * cumulative[:, -1:]).contiguous()
    return torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


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
    noise: NoiseSource,
    sampler: str,
    bridge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One step of [`walk`]: `z [N, D]` at `sigma_next`, of that at `sigma` and its logits. Rows do not meet."""
    if sampler == "euler":
        return euler_step(z, bridge(logits, targets), sigma, sigma_next)
    target = F.embedding(noise.categorical(logits), targets).float()
    return ancestral_step(z, target, sigma, sigma_next, noise.normal(targets.shape[-1]))
