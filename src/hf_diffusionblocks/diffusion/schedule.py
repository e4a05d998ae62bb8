"""The noise schedule: which noise levels there are, and which block owns which of them.

Everything here is float64 and knows nothing of any model. Source: DiffusionBlocks (arXiv 2506.14202),
section 3 (equi-probability partition, overlap); the log-normal is that of EDM (arXiv 2206.00364), table 1.
"""

from __future__ import annotations

import math

import torch

from .randomness import Generators, draw

#: How the levels of a sampler are spaced.
GRIDS = ("equal", "karras")
KARRAS_RHO = 7


class NoiseSchedule:
    """A distribution over sigma in `[sigma_min, sigma_max]`, cut into B blocks of equal probability.

    Block 0 holds the highest noise (and the first layers), block B-1 the lowest. Any other schedule has its `num_blocks`,
    `level_name`, `overlap` and `interval`.

    Args:
        num_blocks: B.
        sigma_min, sigma_max: the range of noise levels.
        p_mean, p_std: mean and standard deviation of ln sigma, of a log-normal truncated to the range.
        overlap: a block trains on its own interval widened by this share of its log-width on both sides.

    Raises:
        ValueError: the distribution has (to float64) no mass in some block's interval.
    """

    level_name = "sigma"  #: what tables call a level

    def __init__(
        self,
        num_blocks: int,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        overlap: float = 0.0,
    ):
        self.num_blocks = num_blocks
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.p_mean, self.p_std = float(p_mean), float(p_std)
        self.overlap = float(overlap)
        with torch.device("cpu"):  # from_pretrained builds models, and their schedules, under the meta device
            ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)
            self._mass_below_min, self._mass_below_max = self._normal_cdf(ends).tolist()
            #: `[B+1]` ascending float64; the first is sigma_min and the last sigma_max, exactly.
            self.boundaries: torch.Tensor = self.quantile(torch.arange(num_blocks + 1, dtype=torch.float64) / num_blocks)
        if not bool((self.boundaries.diff() > 0).all()):
            raise ValueError(
                f"p_mean={p_mean}, p_std={p_std} leave some of {num_blocks} blocks no probability inside "
                f"[sigma_min={sigma_min}, sigma_max={sigma_max}]: move p_mean towards the range or raise p_std"
            )
        with torch.device("cpu"):  # of the interval that each block trains on
            ends = torch.tensor([self.interval(k, self.overlap) for k in range(num_blocks)], dtype=torch.float64)
            self._cdf_of_ends: list[tuple[float, float]] = self.cdf(ends).tolist()

    def _normal_cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        """Probability of a level below `sigma`; float64, same shape."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        mass = self._normal_cdf(sigma)
        return ((mass - self._mass_below_min) / (self._mass_below_max - self._mass_below_min)).clamp(0, 1)

    def quantile(self, fraction: torch.Tensor) -> torch.Tensor:
        """The sigma below which a `fraction` (0..1) of the probability lies; float64, same shape.

        The ends are exact: 0 gives sigma_min and 1 gives sigma_max.
        """
        fraction = torch.as_tensor(fraction, dtype=torch.float64)
        mass = self._mass_below_min + fraction * (self._mass_below_max - self._mass_below_min)
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(mass))
        sigma = sigma.clamp(self.sigma_min, self.sigma_max)
        sigma = torch.where(fraction <= 0, self.sigma_min, sigma)
        return torch.where(fraction >= 1, self.sigma_max, sigma)

    def block_of(self, sigma: torch.Tensor | float) -> torch.LongTensor:
        """The block that owns each noise level: the only map from sigma to block.

        Intervals are open below and closed above, and sigma_min itself belongs to the last block. Boundaries
        ascend while blocks descend in noise, so the index is reversed here and nowhere else.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        inner = self.boundaries[1:-1].to(sigma.device)
        return self.num_blocks - 1 - torch.bucketize(sigma, inner)

    def interval(self, block_index: int, overlap: float = 0.0) -> tuple[float, float]:
        """`(low, high)` of a block, widened in log-sigma by `overlap * ln(high/low)` on both sides, clipped to the range."""
        if not 0 <= block_index < self.num_blocks:
            raise ValueError(f"block_index={block_index} must lie in 0..{self.num_blocks - 1}")
        position = self.num_blocks - 1 - block_index
        low, high = self.boundaries[position].item(), self.boundaries[position + 1].item()
        widening = math.exp(overlap * math.log(high / low))
        return max(low / widening, self.sigma_min), min(high * widening, self.sigma_max)

    def sample(
        self,
        block_index: int,
        shape: tuple[int, ...],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Draw training noise levels for a block: the truncated log-normal, restricted to its widened interval.

        Returns float64 of `shape`, where [`draw`] draws for the device.
        """
        low, high = self.interval(block_index, self.overlap)
        cdf_low, cdf_high = self._cdf_of_ends[block_index]
        # 1 - [0, 1) is (0, 1]: the interval's open lower end is never drawn.
        uniform = 1 - draw(torch.rand, shape, generator, device, dtype=torch.float64)
        sigma = self.quantile(cdf_low + uniform * (cdf_high - cdf_low))
        return sigma.clamp(math.nextafter(low, math.inf), high)

    def stratified(self, block_index: int, num_levels: int, generator: Generators = None) -> torch.Tensor:
        """One level in each of `num_levels` parts of equal probability of a block's own interval, ascending; float64."""
        low, high = self.cdf(torch.tensor(self.interval(block_index), dtype=torch.float64)).tolist()
        part = torch.arange(num_levels, dtype=torch.float64)
        within = (part + draw(torch.rand, (num_levels,), generator, dtype=torch.float64)) / num_levels
        return self.quantile(low + within * (high - low))

    def inference_sigmas(self, num_steps: int, grid: str = "equal") -> torch.Tensor:
        """`[T+1]` descending levels for T denoiser evaluations; float64.

        The last (sigma_min) is where the last step ends and is never evaluated.

        Args:
            num_steps: T.
            grid: "equal" probability between levels, so that all blocks run equally often; or "karras", EDM's ramp with
                rho = 7 (arXiv 2206.00364, equation 5).

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1")
        if grid not in GRIDS:
            raise ValueError(f"grid={grid!r} must be one of {', '.join(map(repr, GRIDS))}")
        # Fractions are `(T-i)/T`, never `1 - i/T`: a level that is a block's boundary is that boundary bit for bit, and falls
        # into the right block.
        fraction = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
        if grid == "equal":
            return self.quantile(fraction)
        low, high = self.sigma_min ** (1 / KARRAS_RHO), self.sigma_max ** (1 / KARRAS_RHO)
        sigmas = (low + fraction * (high - low)) ** KARRAS_RHO
        sigmas[0], sigmas[-1] = self.sigma_max, self.sigma_min  # exactly
        return sigmas
