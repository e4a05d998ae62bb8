"""How a noise level reaches a layer: a sigma embedding, and AdaLN modulation of attention and MLP.

Source: DiffusionBlocks (arXiv 2506.14202), appendix; AdaLN-Zero is that of DiT (arXiv 2212.09748).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class Modulation(NamedTuple):
    """What one layer applies around its attention and its MLP; each `[N, 1, D]`.

    A sub-layer computes `residual + gate * f(norm(x) * scale + shift)`; scale and gate are already `1 + s`, `1 + g`.
    """

    attention_shift: torch.Tensor
    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    mlp_shift: torch.Tensor
    mlp_scale: torch.Tensor
    mlp_gate: torch.Tensor


class SigmaEmbedding(nn.Module):
    """Sinusoids of `c_noise = ln(sigma)/4`, then an MLP: `[N]` -> `[N, D]`."""

    def __init__(self, width: int, num_frequencies: int = 128, max_period: float = 10_000.0):
        super().__init__()
        self.num_frequencies, self.max_period = num_frequencies, max_period
        self.mlp_in = nn.Linear(2 * num_frequencies, width)
        self.mlp_out = nn.Linear(width, width)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        # Frequencies are made on the spot rather than kept in a buffer: a buffer that is not in the checkpoint
        # would be left uninitialised by from_pretrained, which builds on the meta device.
        exponents = torch.arange(self.num_frequencies, device=sigma.device) / self.num_frequencies
        # c_noise spans only [-1.6, 1.1]; times 1000 it covers the range the sinusoids are made for.
        angles = 1000 * (sigma.log() / 4).float()[:, None] * torch.exp(-math.log(self.max_period) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp_in.weight.dtype)
        return self.mlp_out(nn.functional.silu(self.mlp_in(features)))


class AdaLNModulation(nn.Module):
    """One layer's shift, scale and gate from the sigma embedding `[N, D]`.

    Starts at zero (set in the model's `_init_weights`), so that the modulated layer starts as the plain layer, bit
    for bit, fresh or pretrained. A leaf module, since from_pretrained initialises missing weights leaf by leaf; no
    `nn.Linear`, since adapters of all linear layers add to what these return.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(Modulation._fields) * width, width))
        self.bias = nn.Parameter(torch.zeros(len(Modulation._fields) * width))

    def forward(self, sigma_embedding: torch.Tensor) -> Modulation:
        made = nn.functional.linear(nn.functional.silu(sigma_embedding), self.weight, self.bias)
        made = made[:, None, :].chunk(len(Modulation._fields), -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = made
        return Modulation(shift, 1 + scale, 1 + gate, mlp_shift, 1 + mlp_scale, 1 + mlp_gate)
