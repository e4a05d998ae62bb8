"""The paper's classes: what a block is shown of an input and a noisy label, and how the class is read out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from ..diffusion.gaussian import corrupt, precondition
from ..diffusion.objectives import IGNORED
from ..diffusion.randomness import Generators, noise_of_rows
from ..diffusion.samplers import soft_bridge, walk
from ..whole_numbers import whole
from .base import Formulation
from .block import Block


class NoisyLabelToken(nn.Module):
    """The noisy label as one more token of the sequence: `c_in z` plus a learned position."""

    def __init__(self, width: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, z: torch.Tensor, c_in: torch.Tensor) -> torch.Tensor:
        """`z [N, D]`, `c_in [N]` -> `[N, 1, D]`."""
        return (c_in[:, None] * z)[:, None, :].to(self.position.dtype) + self.position


class NoisyLabel(Formulation):
    """The paper's: the noisy label is one more token after those of x, sigma modulates the layers, and a block starts from
    embeddings. Of images the sequence is [CLS, patches, noisy label], read out at CLS."""

    modulated = True

    # ---- what tasks differ in

    def enter(self, block: Block, x: Mapping) -> torch.Tensor:
        """The tokens of x, embedded: `[N, S, D]`."""
        return block.embed(x)

    def attention(self, x: Mapping, hidden: torch.Tensor) -> dict[str, Any]:
        """What layers take beside `[N, S+1, D]`, tokens and noisy label."""
        return {}

    def read_out(self, block: Block, leaving: torch.Tensor) -> torch.Tensor:
        """`[N, S+1, D]` -> `[N, V]`."""
        return block.read_out(leaving)

    # ---- training

    def train(self, block: Block, x: Mapping, labels: torch.Tensor, block_input: torch.Tensor | None, noise: Mapping):
        """What has left a block, `[N, S+1, D]`, and its logits `[N, V]` of p(label | x, z)."""
        self.model.refuse({"block_input": block_input}, "with preset='paper': a block starts from embeddings")
        sigma = self.model.draw_levels(block.index, (len(labels),), noise["sigma"], noise["generator"])
        z = corrupt(self._targets(labels), sigma, noise["noise"], noise["generator"])
        leaving = self._run(block, x, self.enter(block, x), z, sigma)
        return leaving, self.read_out(block, leaving)

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """`[N, D]`, of class numbers `[N]` or of shares of the classes `[N, V]`."""
        vectors = self.model.label_embeddings.vectors()
        if labels.is_floating_point():
            return labels.to(vectors) @ vectors
        return F.embedding(labels.masked_fill(labels == IGNORED, 0), vectors)  # (what has no loss has no target: any will do)

    def _run(self, block: Block, x: Mapping, entering: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What a block makes of embedded tokens `[N, S, D]`, z `[N, D]` and sigma `[N]`: `[N, S+1, D]`."""
        noisy_label = self.model.noisy_labels[self.model.sharing.copy(block.index)]
        c_in = precondition(sigma, self.model.config.sigma_data).input
        hidden = torch.cat([entering, noisy_label(z, c_in)], dim=1)
        return block.run(hidden, block.modulations(sigma), **self.attention(x, hidden))

    # ---- prediction

    def predict(self, x: Mapping, labels: torch.Tensor | None = None, **stock) -> ImageClassifierOutput:
        """Label-free logits: the end of a walk from keyed noise."""
        num_items = stock.pop("num_items_in_batch", None)
        self.model.refuse(self.model.asked_of_stock_model(stock), "with preset='paper': it is for the plain model")
        logits, loss = self.trajectory(x, None, None)[0], None
        if labels is not None:
            loss = self.model.mean_loss(logits, labels, num_items)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def block_logits(self, x: Mapping) -> torch.Tensor:
        """Every block's at sigma_max, `[N, B, V]`, from keyed noise."""
        start = self._noise(len(next(iter(x.values()))), None)
        sigma = torch.full((len(start),), self.model.config.sigma_max, device=self.model.device)
        z, blocks = sigma[:, None] * start, self.model.blocks
        return torch.stack([self.read_out(b, self._run(b, x, self.enter(b, x), z, sigma)) for b in blocks], dim=1)

    def _noise(self, num_rows: int, generator: Generators) -> torch.Tensor:
        """What a walk starts from, `[N, D]`: keyed, or of a generator."""
        config = self.model.config
        return noise_of_rows(num_rows, config.hidden_size, config.inference_seed, generator, self.model.device)

    def trajectory(
        self, x: Mapping, num_steps: int | None, generator: Generators
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a walk: its last logits `[N, V]`, the probabilities after each of T evaluations `[N, T, V]`, and its levels."""
        model, num_rows, probabilities = self.model, len(next(iter(x.values()))), []
        steps = model.config.num_inference_steps if num_steps is None else num_steps
        sigmas = model.noise_schedule.inference_sigmas(whole("num_inference_steps", steps, 1, ", or None"))
        owners = model.noise_schedule.block_of(sigmas[:-1]).tolist()
        embedded: dict[int, torch.Tensor] = {}

        def denoise(z: torch.Tensor, step: int) -> torch.Tensor:
            block = model.blocks[owners[step]]
            if block.index not in embedded:
                embedded[block.index] = self.enter(block, x)
            sigma = torch.full((num_rows,), sigmas[step].item(), device=z.device)
            logits = self.read_out(block, self._run(block, x, embedded[block.index], z, sigma))
            probabilities.append(logits.float().softmax(-1))
            return logits

        noise, targets = self._noise(num_rows, generator), model.label_embeddings.vectors()
        logits, _ = walk(denoise, targets, sigmas, noise, soft_bridge)
        return logits, torch.stack(probabilities, dim=1), sigmas
