"""Llama of recurrent depth: one core, run several times over, between a prelude and a coda."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..recurrent_depth_llama import RecurrentDepthLlamaConfig
from .llama import LlamaBackbone


class RecurrentDepthLlamaBackbone(LlamaBackbone):
    """What runs for noisy tokens is one block: the core, and the coda that reads its state. The state is z, or nothing.

    So a training step runs the core once, where the plain model runs it several times over, and a walk of K levels
    runs it K times (DiffusionBlocks, arXiv 2506.14202, section on recurrent depth).
    """

    fixed_fields = {"num_blocks": 1, "preset": "paper"}
    fixed_because = "one core, whose state is z, is the denoiser of all noise levels"

    def largest_step(self, config: RecurrentDepthLlamaConfig) -> dict[str, int]:
        return {"num_steps": config.num_backprop_steps}  # what runs before these holds nothing

    def num_layers(self, config: RecurrentDepthLlamaConfig) -> int:
        """Those of core and coda."""
        return config.num_core_layers + config.num_coda_layers

    def layers_path(self, plain: nn.Module, num_layers: int) -> str:
        return "model.layers"

    def enter(
        self, plain: nn.Module, embedded: torch.Tensor, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in plain.model.prelude:
            embedded = run(layer, embedded)
        return embedded, self._inject(plain, torch.zeros_like(embedded), embedded)

    def embed_noisy(
        self, plain: nn.Module, embeds: torch.Tensor, position_ids: torch.Tensor, prelude_output: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        return self._inject(plain, embeds, prelude_output[:, kept])

    def _inject(self, plain: nn.Module, state: torch.Tensor, prelude_output: torch.Tensor) -> torch.Tensor:
        return plain.model.adapter(torch.cat([state, prelude_output], -1))
