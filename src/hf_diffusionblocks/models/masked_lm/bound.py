"""The likelihood bound of masked diffusion, in counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...diffusion.likelihood import LikelihoodTerms
from ...diffusion.masking import draw_masked
from ...diffusion.objectives import IGNORED
from ...diffusion.randomness import Generators, draw
from ..base import DiffusionBlocksPreTrainedModel
from .text import MaskedText


def likelihood_terms(
    model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor], num_samples: int, generator: Generators
) -> LikelihoodTerms:
    """With l of L labels masked, l uniform on 1..L and the set uniform, a text costs at most
    `E[(L / l) * sum over masked of -ln p(token | z)]` (LLaDA, arXiv 2502.09992, equation 14), each term by the block that
    owns the masked share. It is the mean over all L! orders of the loss of revealing the text in that order.

    Args:
        num_samples: counts l a text, stratified over 1..L.
        generator: of counts and sets; or one a text, N of them.

    Raises:
        ValueError: a token that has a label is MASK.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    num_texts, total = len(batch["labels"]), 0.0
    for sample in range(num_samples):
        uniform = draw(torch.rand, (num_texts,), generator, dtype=torch.float64)
        total += sampled_bound(model, batch, (sample + uniform) / num_samples, generator) / num_samples
    zeros = torch.zeros(num_texts, dtype=torch.float64)
    return LikelihoodTerms(_maskable(batch).sum(1).double().cpu(), 0.0, zeros, total.cpu())


def sampled_bound(
    model: DiffusionBlocksPreTrainedModel, batch: Mapping[str, torch.Tensor], share: torch.Tensor, generator: Generators
) -> torch.Tensor:
    """The bound of each text by one set of masks, in nats, `[N]` float64.

    Args:
        batch: on the model's device.
        share: `[N]`, of 0 to 1: where in 1..L the count of masks lies.
        generator: of the sets; or one a text, N of them.

    Raises:
        ValueError: a token that has a label is MASK.
    """
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
    text, labels, maskable = MaskedText(*(batch.get(name) for name in names)), batch["labels"], _maskable(batch)
    if bool((text.holds(model.mask_token_id) & maskable).any()):
        raise ValueError(f"input_ids hold mask_token_id={model.mask_token_id} where labels are scored: give whole texts")
    most = maskable.sum(1)
    counts = torch.minimum((share.to(most.device) * most).long() + 1, most)
    masked = draw_masked(counts, maskable, generator)
    sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for block, rows, hidden in model.answers(text.masked(masked, model.mask_token_id)):
        sums[rows] = model.sums_of_rows(block, hidden, labels[rows], masked[rows])
    return most / counts.clamp(min=1) * sums


def _maskable(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    attended = batch.get("attention_mask")
    labelled = batch["labels"] != IGNORED
    return labelled if attended is None else labelled & attended.bool()
