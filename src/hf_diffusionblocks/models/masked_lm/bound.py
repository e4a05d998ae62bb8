"""The likelihood bound of masked diffusion, in counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...diffusion.masking import draw_masked
from ...diffusion.objectives import IGNORED, LikelihoodTerms
from ...diffusion.randomness import Generators
from ..base import DiffusionBlocksPreTrainedModel
from .text import MaskedText


def likelihood_terms(
    model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor], num_samples: int, generator: torch.Generator
) -> LikelihoodTerms:
    """With l of L labels masked, l uniform on 1..L and the set uniform, a text costs at most
    `E[(L / l) * sum over masked of -ln p(token | z)]` (LLaDA, arXiv 2502.09992, equation 14), each term by the block that
    owns the masked share. It is the mean over all L! orders of the loss of revealing the text in that order.

    Args:
        num_samples: counts l a text, stratified over 1..L.
        generator: of counts and sets.

    Raises:
        ValueError: a token that has a label is MASK.
    """
    scored = ScoredTexts.of(model, batch)
    num_texts, total = len(scored.labels), 0.0
    for sample in range(num_samples):
        uniform = torch.rand(num_texts, generator=generator, dtype=torch.float64)
        total += scored.sampled_bound(model, (sample + uniform) / num_samples, generator) / num_samples
    zeros = torch.zeros(num_texts, dtype=torch.float64)
    return LikelihoodTerms(scored.maskable.sum(1).double().cpu(), 0.0, zeros, total.cpu())


class ScoredTexts(NamedTuple):
    """Whole texts, on the model's device, and which of their tokens are scored."""

    text: MaskedText
    labels: torch.Tensor  #: `[N, S]`
    maskable: torch.Tensor  #: bool, `[N, S]`

    @classmethod
    def of(cls, model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor]) -> ScoredTexts:
        """Raises ValueError if a token that has a label is MASK."""
        batch = {name: value.to(model.device) for name, value in batch.items()}
        text, labels = MaskedText(*(batch.get(name) for name in MaskedText._fields)), batch["labels"]
        maskable = (labels != IGNORED) & text.attended
        if bool((text.holds(model.mask_token_id) & maskable).any()):
            raise ValueError(f"input_ids hold mask_token_id={model.mask_token_id} where labels are scored: give whole texts")
        return cls(text, labels, maskable)

    def sampled_bound(self, model: DiffusionBlocksPreTrainedModel, share: torch.Tensor, generator: Generators) -> torch.Tensor:
        """The bound of each text by one set of masks, in nats, `[N]` float64.

        Args:
            share: `[N]`, of 0 to 1: where in 1..L the count of masks lies.
            generator: of the sets; or one a text, N of them.
        """
        most = self.maskable.sum(1)
        counts = torch.minimum((share.to(most.device) * most).long() + 1, most)
        masked = draw_masked(counts, self.maskable, generator)
        sums = torch.zeros(len(most), dtype=torch.float64, device=most.device)
        for block, rows, hidden in model.answers(self.text.masked(masked, model.mask_token_id)):
            sums[rows] = model.sums_of_rows(block, hidden, self.labels[rows], masked[rows])
        return most / counts.clamp(min=1) * sums
