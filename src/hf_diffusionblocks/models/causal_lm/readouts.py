"""How what leaves a block becomes logits of the next token: `config.readout`, as an object."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...diffusion.categorical import posterior_logits
from ...diffusion.gaussian import Preconditioning, precondition
from ..base import DiffusionBlocksPreTrainedModel
from ..block import Block
from .text import Rows


class WalkLevel(NamedTuple):
    """A level of a walk, and what depends on it alone."""

    sigma: torch.Tensor  #: `[1]` float32
    c: Preconditioning
    is_first: bool  #: whether it is sigma_max, where z says nothing


class EDMReadout:
    """The paper's: the head on `(c_skip z + c_out F) / sigma_data`; at sigma_max, where c_out is sigma_data and c_skip
    nothing, it reads F as the plain model does."""

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model

    def targets(self) -> None:
        """It looks at no targets."""

    def logits(self, block: Block, rows: Rows, targets: None = None) -> torch.Tensor:
        """`[R, V]` of p(token | before, z)."""
        return self._logits(block, rows.hidden, rows.z, precondition(rows.sigma[:, None], self.model.sigma_data))

    def in_walk(self, block: Block, hidden, z, level: WalkLevel, targets, control: Callable) -> torch.Tensor:
        """The same, at one level of a walk, under the controls of generation."""
        return control(self._logits(block, hidden, z, level.c))

    def _logits(self, block: Block, hidden: torch.Tensor, z: torch.Tensor, c: Preconditioning) -> torch.Tensor:
        architecture, parts = self.model.architecture, block.readout_parts
        normed = architecture.final_norm(parts, hidden)
        estimate = c.skip / self.model.sigma_data * z + c.out / self.model.sigma_data * normed
        return architecture.head(parts, estimate.to(normed.dtype)).float()


class PosteriorReadout:
    """The head on F gives the prior, and z its likelihood, by Bayes' rule."""

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model

    def targets(self) -> torch.Tensor:
        """The vectors e_v, `[V, D]`."""
        return self.model.target_vectors()

    def logits(self, block: Block, rows: Rows, targets: torch.Tensor | None = None) -> torch.Tensor:
        """`[R, V]` of p(token | before, z); without z, or at sigma_max, of p(token | before)."""
        hidden, z, sigma = rows
        prior, sigma_max = block.read_out(hidden).float(), self.model.config.sigma_max
        if z is None:
            return prior
        visible = torch.where(sigma < sigma_max, sigma, torch.inf)
        return posterior_logits(prior, z, visible, self.targets() if targets is None else targets)

    def in_walk(self, block: Block, hidden, z, level: WalkLevel, targets, control: Callable) -> torch.Tensor:
        """The same, at one level of a walk, under the controls of generation: these act on the prior."""
        prior = control(block.read_out(hidden).float())
        return prior if level.is_first else posterior_logits(prior, z, level.sigma.expand(len(z)), targets)


READOUTS = {"edm": EDMReadout, "posterior": PosteriorReadout}
