"""What a likelihood bound is summed up from."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LikelihoodTerms(NamedTuple):
    """Of a batch of N sequences; float64, on the CPU."""

    tokens: torch.Tensor  #: `[N]`, tokens scored
    prior: float  #: nats a token that no data change
    reconstruction: torch.Tensor  #: `[N]` nats of the last step
    diffusion: torch.Tensor  #: `[N]` nats of all others
