"""Image classification: x is the image's patches, y the L2-normalised embedding of its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ...configuration import DiffusionBlocksConfig
from ...diffusion.objectives import IGNORED, num_counted
from ...diffusion.randomness import Generators
from ..active import without_dropout
from ..base import CleanInput, DiffusionBlocksPreTrainedModel
from ..targets import FixedTargets
from .formulations import JointImage, LocalImage, NoisyLabelToken


@dataclass
class WalkClassifierOutput(ModelOutput):
    """What [`DiffusionBlocksForImageClassification.predict`] returns.

    Args:
        logits: `[N, num_labels]` of the last evaluation.
        probabilities: their softmax.
        trajectory: `[N, T, num_labels]`, the probabilities after each evaluation: of the steps of a walk, or of the blocks.
        sigmas: `[T+1]` float64, the levels walked, of which the last is not evaluated; None where nothing walks.
    """

    logits: torch.FloatTensor | None = None
    probabilities: torch.FloatTensor | None = None
    trajectory: torch.FloatTensor | None = None
    sigmas: torch.DoubleTensor | None = None


class DiffusionBlocksForImageClassification(DiffusionBlocksPreTrainedModel):
    """A ViT whose blocks tell the class, each by itself; it is read from CLS.

    Recommended: each on the cross-entropy of what it has made of the image; the whole is used as the plain model is. The
    paper's (arXiv 2506.14202, appendix on image classification): each a denoiser of the label's embedding, at its own noise
    levels.
    """

    main_input_name = "pixel_values"
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every image of a step counts alike
    task = "image-classification"
    FORMULATIONS = {"recommended": LocalImage, "paper": JointImage}
    copied_modules = ("noisy_labels",)

    def __init__(self, config: DiffusionBlocksConfig):
        _check_problem(config)
        super().__init__(config)
        if self.formulation.modulated:
            self.label_embeddings = FixedTargets(config.num_labels, config.hidden_size)
            copies = range(self.sharing.num_copies)
            self.noisy_labels = nn.ModuleList(NoisyLabelToken(config.hidden_size) for _ in copies)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoisyLabelToken):
            init.zeros_(module.position)

    # ---- training and evaluation

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        block_index: int | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool | None = None,
        block_input: torch.Tensor | None = None,
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
            block_input: the hidden states `[N, S, D]` that enter the block, where the earlier blocks are not run but
                their output is there.
            num_items_in_batch: images that the summed loss is divided by; None is those of this batch.
            stock: classification: what else the plain model takes (`output_hidden_states`, ...).

        Returns:
            `loss` (with labels) and `logits`; of a block also `hidden_states`, what has left it, without gradient (a tuple of
            one; recommended: `[N, S, D]`, for the next). Without `block_index` the logits are label-free: recommended, what
            the plain model gives; the paper's, the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training; or an argument is not of this formulation.
        """
        self.check_block_given(block_index, labels)
        labels = None if labels is None else self._checked(labels, len(pixel_values))
        x = self._clean(pixel_values, interpolate_pos_encoding)
        noise = {"sigma": sigma, "noise": noise, "generator": generator}
        if block_index is None:
            self.refuse({**noise, "block_input": block_input}, "without block_index: it is of a block that trains")
            if num_items_in_batch is not None:
                stock["num_items_in_batch"] = num_items_in_batch
            return self.formulation.predict(x, labels=labels, **stock)
        self.refuse(stock, "with block_index, which has a loss of its own: leave it out of the batch")
        leaving, logits = self.formulation.train(self.blocks[block_index], x, labels, block_input, noise)
        loss = self.mean_loss(logits, labels, num_items_in_batch)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=(leaving.detach(),))

    def mean_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items) -> torch.Tensor:
        """The cross-entropy of those that have a label: their mean, or, of a micro-batch, its part of the mean over the
        step's `num_items`."""
        total = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
        return total / num_counted(self.counted_labels({"labels": labels}), num_items, self.training)

    def counted_labels(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One an image, also of shares."""
        labels = batch["labels"]
        return labels.argmax(-1) if labels.is_floating_point() else labels

    def _checked(self, labels: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Class numbers `[N]`, or shares of the classes."""
        _check_problem(self.config)  # (which may have been set since)
        labels = labels[:, 0] if labels.shape == (num_rows, 1) else labels  # as the plain model has it
        shape = (num_rows, self.config.num_labels) if labels.is_floating_point() else (num_rows,)
        if labels.shape != shape or labels.is_floating_point() and _add_up_to_other_than_1(labels):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} must be class numbers, [{num_rows}], or shares of the classes that add "
                f"up to 1, [{num_rows}, {self.config.num_labels}]: several classes of an image at once are for the plain model"
            )
        return labels

    def clean_input(self, batch: Mapping[str, torch.Tensor]) -> CleanInput:
        return self._clean(batch["pixel_values"], batch.get("interpolate_pos_encoding", False))

    def _clean(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> CleanInput:
        return CleanInput({"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}, {})

    def block_logits(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Label-free logits of every block, `[N, B, num_labels]`: through its local head, if it has one; the paper's at
        sigma_max, from the walk's (keyed) starting noise, where only block 0 has been trained."""
        return self.formulation.block_logits(self._clean(pixel_values, interpolate_pos_encoding))

    @torch.no_grad()
    def predict(
        self,
        pixel_values: torch.Tensor,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> WalkClassifierOutput:
        """Classify, and show how: block by block, or, the paper's, by walking from noise to a label.

        The walk *samples* p(label | x). With T = B steps each block runs once.

        Args:
            pixel_values: `[N, C, H, W]`.
            num_inference_steps: the paper's: T; None is the config's.
            generator: the paper's: of the walk's noise, independent for each row; None takes the keyed noise, equal for every
                row.
            interpolate_pos_encoding: as in the plain model.

        Raises:
            ValueError: steps or a generator are given where nothing walks.
        """
        with without_dropout(self):
            x = self._clean(pixel_values, interpolate_pos_encoding)
            logits, trajectory, sigmas = self.formulation.trajectory(x, num_inference_steps, generator)
        return WalkClassifierOutput(
            logits=logits, probabilities=logits.float().softmax(-1), trajectory=trajectory, sigmas=sigmas
        )


def _check_problem(config: DiffusionBlocksConfig) -> None:
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"problem_type={config.problem_type!r} with num_labels={config.num_labels} must be "
            "'single_label_classification' with at least 2 labels: a block tells one class of several"
        )


def _add_up_to_other_than_1(shares: torch.Tensor) -> bool:
    on_cpu = shares.device.type == "cpu"  # (no wait for a device)
    return on_cpu and bool(((shares.float().sum(-1) - 1).abs() > 1e-2).any())
