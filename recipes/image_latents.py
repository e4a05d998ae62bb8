"""How latents of a VAE become those of a transformer, found from what a pipeline makes of probes."""

from __future__ import annotations

import torch

PROBES = 5  #: rows of latents that tell it: see [`LatentMap`]


class LatentMap:
    """How latents of the VAE become those of the transformer, at one size: in another order (packed into tokens), scaled
    and shifted.

    Args:
        like: latents that the transformer is given, `[1, ...]`.
        probes: what the VAE was given for rows of zeros, of ones, of the two digits of each place's number, and of noise.
        noise: that row.

    Raises:
        ValueError: it is another map.
    """

    def __init__(self, like: torch.Tensor, probes: torch.Tensor, noise: torch.Tensor):
        zero, one, high, low, noisy = probes.double()
        base = digits_of(like)
        self.shape = tuple(like.shape[1:])
        self.vae_shape = tuple(probes.shape[1:])
        self._shift, self._scale = zero, one - zero
        places = [((digit - zero) / self._scale * base).round().nan_to_num(-1).long() for digit in (high, low)]
        self._place = (places[0] * base + places[1]).flatten()
        if sorted(self._place.tolist()) != list(range(like[0].numel())):
            raise ValueError("its latents are not those of the VAE in another order, scaled and shifted")
        if not torch.allclose(self(noisy[None].float())[0], noise, atol=1e-3, rtol=1e-3):
            raise ValueError("its latents do not come back from the VAE's")

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Of the VAE `[N, *vae_shape]` -> of the transformer `[N, *shape]`, float32."""
        scaled = ((latents.cpu().double() - self._shift) / self._scale).flatten(1)
        placed = torch.empty_like(scaled)
        placed[:, self._place] = scaled
        return placed.reshape(-1, *self.shape).float()


def digits_of(like: torch.Tensor) -> int:
    """The base in which two digits count the numbers of a row."""
    return int(like[0].numel() ** 0.5) + 1


def probes_like(sample: torch.Tensor) -> torch.Tensor:
    """Latents of `PROBES` rows that tell where each number goes, shaped as those of a pipeline."""
    like = sample[:1].float()
    number, base = torch.arange(like.numel()), digits_of(like)
    rows = [0 * number, 1 + 0 * number, (number // base) / base, (number % base) / base]
    noise = torch.randn(like.numel(), generator=torch.Generator().manual_seed(0))
    return torch.stack([*(row.float() for row in rows), noise]).reshape(PROBES, *like.shape[1:]).to(sample.device)
