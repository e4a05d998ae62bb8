"""The likelihood bound of masked diffusion, in counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...diffusion.likelihood import LikelihoodTerms
from ...diffusion.masking import draw_masked
from ...diffusion.objectives import IGNORED
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
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch["labels"]
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
    text = MaskedText(*(batch.get(name) for name in names))
    maskable = (labels != IGNORED) & text.attended
    if bool((text.holds(model.mask_token_id) & maskable).any()):
        raise ValueError(f"input_ids hold mask_token_id={model.mask_token_id} where labels are scored: give whole texts")
    most = maskable.sum(1)
    total = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for sample in range(num_samples):
        uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64).to(labels.device)
        counts = torch.minimum(((sample + uniform) / num_samples * most).long() + 1, most)
        masked = draw_masked(counts, maskable, generator)
        sums = torch.zeros_like(total)
        for block, rows, hidden in model.answers(text.masked(masked, model.mask_token_id)):
            sums[rows] = model.sums_of_rows(block, hidden, labels[rows], masked[rows])
        total += most / counts.clamp(min=1) * sums / num_samples
    return LikelihoodTerms(most.double().cpu(), 0.0, torch.zeros(len(labels), dtype=torch.float64), total.cpu())
