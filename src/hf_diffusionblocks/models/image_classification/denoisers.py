"""How the noisy label meets the image: `config.denoiser`, as an object."""

from __future__ import annotations

import torch
from torch import nn

from ...diffusion.gaussian import precondition
from ..base import BlockOutput, Clean, DiffusionBlocksPreTrainedModel
from ..block import Block


class NoisyLabelToken(nn.Module):
    """The noisy label as one more token of the sequence: `c_in z` plus a learned position."""

    def __init__(self, width: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, z: torch.Tensor, c_in: torch.Tensor) -> torch.Tensor:
        """`z [N, D]`, `c_in [N]` -> `[N, 1, D]`."""
        return (c_in[:, None] * z)[:, None, :].to(self.position.dtype) + self.position


class JointImage:
    """The paper's: the sequence is [CLS, patches, noisy label], and sigma modulates the layers."""

    modulated = True
    embeds_noisy = False

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model

    def run(
        self, block: Block, x: Clean, z: torch.Tensor, sigma: torch.Tensor, cached: torch.Tensor | None = None
    ) -> BlockOutput:
        """What a block makes of the image, z `[N, D]` and sigma `[N]`: `[N, S+1, D]`, of no use to the next."""
        return self._run(block, self.model.entering(block, x, cached), z, sigma)

    def _run(self, block: Block, hidden: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> BlockOutput:
        noisy_label = self.model.noisy_labels[self.model.sharing.copy(block.index)]
        hidden = torch.cat([hidden, noisy_label(z, precondition(sigma, self.model.sigma_data).input)], dim=1)
        leaving = block.run(hidden, block.modulations(sigma))
        return BlockOutput(leaving, block.run_local_head(leaving))

    def _read(self, block_index: int, hidden: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """F: logits `[N, V]` of one block, of what enters it."""
        block = self.model.blocks[block_index]
        return block.read_out(self._run(block, hidden, z, sigma).read)

    def walk_denoiser(self, x: Clean):
        """`(block, z [N, D], sigma [N]) -> F, logits [N, V]`: what a walk reads out from."""
        entering = self.entering_all(x)
        return lambda block_index, z, sigma: self._read(block_index, entering[block_index], z, sigma)

    def entering_all(self, x: Clean) -> list[torch.Tensor]:
        """Inference: the hidden states that enter each block, first block first."""
        if self.model.context.passes_on:
            return [self.model.blocks[0].embed(x.inputs), *self.model.clean_outputs(x, without_last=True)]
        return [block.embed(x.inputs) for block in self.model.blocks]

    def prior_logits(self, x: Clean) -> torch.Tensor:
        """Every block's logits at sigma_max, `[N, B, V]`, where the layers see keyed noise alone."""
        start = self.model.noise_source(len(x.inputs["pixel_values"])).normal(self.model.config.hidden_size)
        sigma = torch.full((len(start),), self.model.config.sigma_max, device=self.model.device)
        entering = enumerate(self.entering_all(x))
        return torch.stack([self._read(k, hidden, sigma[:, None] * start, sigma) for k, hidden in entering], dim=1)

    def logits(self, x: Clean) -> torch.Tensor:
        """Label-free logits `[N, V]`: the end of a walk from keyed noise."""
        return self.model.walk(x)[0]


class FactorizedImage:
    """The layers see [CLS, patches] alone: the noise enters by Bayes' rule in the readout."""

    modulated = False
    embeds_noisy = False

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model

    def run(
        self, block: Block, x: Clean, z: torch.Tensor, sigma: torch.Tensor, cached: torch.Tensor | None = None
    ) -> BlockOutput:
        """What a block makes of the image, `[N, S, D]`: its prior is read from it."""
        return self.model.training_output(block, x, cached)

    def walk_denoiser(self, x: Clean):
        """`(block, z [N, D], sigma [N]) -> F, logits [N, V]`: what a walk reads out from. Each block runs once, whatever z
        is."""
        priors = self.prior_logits(x)
        return lambda block_index, z, sigma: priors[:, block_index]

    def prior_logits(self, x: Clean) -> torch.Tensor:
        """Every block's, `[N, B, V]`."""
        pairs = zip(self.model.blocks, self.model.clean_outputs(x))
        return torch.stack([block.read_out(block.run_local_head(out)) for block, out in pairs], dim=1)

    def logits(self, x: Clean) -> torch.Tensor:
        """Label-free logits `[N, V]`: the priors of the blocks that have a say."""
        outputs, model = self.model.clean_outputs(x), self.model
        return model.context.answer(
            [model.blocks[k].read_out(outputs[k]) for k in model.context.answering(model.num_blocks)]
        )
