"""Text classification: x is a text, y its label."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from ...diffusion.randomness import Generators
from ..classification import DiffusionBlocksClassifier, LocalClasses, WalkClassifierOutput
from .formulations import NoisyLabelAfterText


class DiffusionBlocksForSequenceClassification(DiffusionBlocksClassifier):
    """A text classifier, encoder or decoder, whose blocks tell the class, each by itself.

    Recommended: each on the cross-entropy of what it has made of the text; the whole is used as the plain model is. As the
    paper's images are classified, decoders alone: each a denoiser of the label's embedding, at its own noise levels.
    """

    main_input_name = "input_ids"
    task = "text-classification"
    FORMULATIONS = {"recommended": LocalClasses, "paper": NoisyLabelAfterText}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        block_index: int | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
        return_logits: bool | None = None,
        block_input: Any = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **stock,
    ) -> ImageClassifierOutput:
        """Train one block (`block_index` given), or classify.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: as in the plain model.
            labels: `[N]` class numbers, of which -100 has no loss; or `[N, num_labels]`, shares of the classes.
            block_index: the block to train. Needs `labels`. The paper's logits then know the true label, through z.
            sigma: the paper's: noise levels `[N]` to train at; drawn for the block when None.
            noise: the paper's: standard normal `[N, D]`; drawn when None.
            generator: of the draws; or one a text, N of them.
            return_logits: for all tasks alike; logits of classes are always returned.
            block_input: what has left the block before, as it gives it, where the earlier blocks are not run.
            num_items_in_batch: texts that the summed loss is divided by; None is those of this batch.
            stock: classification: what else the plain model takes (`output_hidden_states`, ...).

        Returns:
            `loss` (with labels) and `logits` `[N, num_labels]`, label-free; of a block also `hidden_states`, what has left it,
            without gradient (a tuple of one, for the next).

        Raises:
            ValueError: labels are missing for a block, or a block for training; or an argument is not of this formulation.
        """
        x = _stock_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        draws = {"sigma": sigma, "noise": noise, "generator": generator}
        return self._classify(x, labels, block_index, block_input, draws, num_items_in_batch, stock)

    def block_logits(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Label-free logits of every block, `[N, B, num_labels]`: through its local head, if it has one; the paper's at
        sigma_max, from keyed noise."""
        return self.formulation.block_logits(_stock_inputs(input_ids, attention_mask, token_type_ids))

    def predict(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
    ) -> WalkClassifierOutput:
        """Classify, and show how: block by block, or, the paper's, by walking from noise to a label, as of images."""
        return self._predict(_stock_inputs(input_ids, attention_mask, token_type_ids), num_inference_steps, generator)


def _stock_inputs(input_ids, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None) -> dict:
    """(Not every classifier knows of token types, or of positions.)"""
    given = {
        "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
        "position_ids": position_ids, "inputs_embeds": inputs_embeds,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}
