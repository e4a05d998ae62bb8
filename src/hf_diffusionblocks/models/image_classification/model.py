"""Image classification: x is the image's patches, y the L2-normalised embedding of its label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from ...diffusion.randomness import Generators
from ..classification import DiffusionBlocksClassifier, LocalClasses, WalkClassifierOutput
from ..noisy_label import NoisyLabel


class DiffusionBlocksForImageClassification(DiffusionBlocksClassifier):
    """An image classifier whose blocks tell the class, each by itself.

    Recommended: each on the cross-entropy of what it has made of the image; the whole is used as the plain model is. The
    paper's (arXiv 2506.14202, appendix on image classification): each a denoiser of the label's embedding, at its own noise
    levels.
    """

    main_input_name = "pixel_values"
    takes_stock_tensors = True
    task = "image-classification"
    FORMULATIONS = {"recommended": LocalClasses, "paper": NoisyLabel}

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        block_index: int | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool | None = None,
        block_input: Any = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **stock,
    ) -> ImageClassifierOutput:
        """Train one block (`block_index` given), or classify.

        Args:
            pixel_values: `[N, C, H, W]`.
            labels: `[N]` class numbers, of which -100 has no loss; or `[N, num_labels]`, shares of the classes (mixup).
            block_index: the block to train. Needs `labels`. The paper's logits are then those of p(label | x, z) with the
                true label inside z: their cross-entropy is a training loss, not a likelihood.
            sigma: the paper's: noise levels `[N]` to train at; drawn for the block when None.
            noise: the paper's: standard normal `[N, D]`; drawn when None.
            generator: of the draws; or one an image, N of them.
            interpolate_pos_encoding: as in the plain model.
            return_logits: for all tasks alike; logits of images are always returned.
            block_input: what has left the block before, as it gives it, where the earlier blocks are not run.
            num_items_in_batch: images that the summed loss is divided by; None is those of this batch.
            stock: what else the plain model takes: tensors (`spatial_shapes`), and in classification what it is asked for
                (`output_hidden_states`, ...).

        Returns:
            `loss` (with labels) and `logits`; of a block also `hidden_states`, what has left it, without gradient (a tuple of
            one; recommended: `[N, S, D]`, for the next). Without `block_index` the logits are label-free: recommended, what
            the plain model gives; the paper's, the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training; or an argument is not of this formulation.
        """
        x, stock = self._stock_inputs(pixel_values, interpolate_pos_encoding, stock)
        draws = {"sigma": sigma, "noise": noise, "generator": generator}
        return self._classify(x, labels, block_index, block_input, draws, num_items_in_batch, stock)

    def block_logits(
        self, pixel_values: torch.Tensor | None = None, interpolate_pos_encoding: bool = False, **stock: torch.Tensor
    ) -> torch.Tensor:
        """Label-free logits of every block, `[N, B, num_labels]`: through its local head, if it has one; the paper's at
        sigma_max, from the walk's (keyed) starting noise, where only block 0 has been trained."""
        x, others = self._stock_inputs(pixel_values, interpolate_pos_encoding, stock)
        self.refuse(others, "to see what every block says")
        return self.formulation.block_logits(x)

    def predict(
        self,
        pixel_values: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        interpolate_pos_encoding: bool = False,
        **stock: torch.Tensor,
    ) -> WalkClassifierOutput:
        """Classify, and show how: block by block, or, the paper's, by walking from noise to a label.

        The walk *samples* p(label | x). With T = B steps each block runs once.

        Args:
            pixel_values: `[N, C, H, W]`.
            num_inference_steps: the paper's: T; None is the config's.
            generator: the paper's: of the walk's noise, independent for each row; or one an image. None takes the keyed noise,
                equal for every row.
            interpolate_pos_encoding: as in the plain model.

        Raises:
            ValueError: steps or a generator are given where nothing walks.
        """
        x, others = self._stock_inputs(pixel_values, interpolate_pos_encoding, stock)
        self.refuse(others, "to predict")
        return self._predict(x, num_inference_steps, generator)

    def _stock_inputs(
        self, pixel_values: torch.Tensor | None, interpolate_pos_encoding: bool, others: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the plain model takes of an image, and what else of `others` it is asked for. (Not every classifier knows of
        positions.)"""
        named = ((name, value) for name, value in others.items() if name in self.stock_arguments)
        tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
        x = {"pixel_values": pixel_values, **tensors, "interpolate_pos_encoding": interpolate_pos_encoding or None}
        asked = {name: value for name, value in others.items() if name not in tensors}
        return {name: value for name, value in x.items() if value is not None}, asked
