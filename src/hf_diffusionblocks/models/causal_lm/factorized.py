"""Text whose layers see the tokens before, and nothing of z: the noise enters by Bayes' rule in the readout."""

from __future__ import annotations

import torch

from ...diffusion.objectives import cross_entropy, rows_with_loss
from ..base import BlockOutput, DiffusionBlocksPreTrainedModel
from ..block import Block
from .text import Text


class FactorizedText:
    """An ordinary causal pass; z meets x in the readout alone."""

    modulated = False
    embeds_noisy = False
    walks = False  #: whether a token's logits are the end of a walk

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model

    @staticmethod
    def check_attention(requested: str | None) -> None:
        """Every implementation of attention goes with it."""

    def shape_of_levels(self, targets: torch.Tensor) -> tuple[int, ...]:
        """A noise level for each token: layers do not depend on it."""
        return targets.shape

    def run(self, block: Block, text: Text, z: torch.Tensor | None, sigma: torch.Tensor) -> BlockOutput:
        """What has left a block, `[N, S, D]`, and what tokens 1 to S-1 are read out from, `[N, S-1, D]`."""
        leaving, read = self.model.training_output(block, self.model.clean(text), text.block_input)
        return BlockOutput(leaving, read[:, :-1])

    def new_walk(self, num_steps: int | None) -> None:
        """No walk: one evaluation says all.

        Raises:
            ValueError: several are asked for.
        """
        if num_steps not in (None, 1):
            raise ValueError(
                f"num_steps={num_steps!r} must be 1 or None with denoiser='factorized': its layers never see z, and say the "
                "same at every step"
            )

    def predict(self, text: Text, kept: torch.Tensor, text_walk) -> torch.Tensor:
        """Label-free logits `[N, Q, V]` of the tokens after the clean tokens `kept`."""
        return self._answer(self._rows(text, kept))

    def loss(self, text: Text, labels: torch.Tensor, num_items, text_walk) -> torch.Tensor:
        """Their mean cross-entropy, without ever holding all of them."""
        kept = torch.arange(labels.shape[1] - 1, device=labels.device)
        rows, targets = self._rows(text, kept).flatten(0, 1), labels[:, 1:].flatten()
        labelled = rows_with_loss(targets, at_most=len(targets))
        return self.model.mean_of_rows(
            lambda rows, targets: cross_entropy(self._answer(rows).float(), targets).sum(),
            [rows[labelled], targets[labelled]],
            [self.model.blocks[k] for k in self._answering],
            num_items,
        )

    @property
    def _answering(self) -> range:
        return self.model.context.answering(self.model.num_blocks)

    def _rows(self, text: Text, kept: torch.Tensor) -> torch.Tensor:
        """What left the blocks that have a say, `[N, Q, 1 or B, D]`."""
        outputs = self.model.clean_outputs(self.model.clean(text))
        return torch.stack([outputs[k][:, kept] for k in self._answering], 2)

    def _answer(self, rows: torch.Tensor) -> torch.Tensor:
        """Label-free logits `[..., V]` of such rows `[..., 1 or B, D]`."""
        blocks = (self.model.blocks[k] for k in self._answering)
        return self.model.context.answer([block.read_out(row) for block, row in zip(blocks, rows.unbind(-2))])

    def prior_logits(self, text: Text) -> torch.Tensor:
        """Every block's, `[N, B, S, V]`."""
        x = self.model.clean(text)
        pairs = zip(self.model.blocks, self.model.clean_outputs(x))
        return torch.stack([block.read_out(block.run_local_head(out, **x.attention)) for block, out in pairs], 1)
