"""What classifiers share, of images and of texts: y is a label, x what the stock model takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput

from ..backbones.staged import StageHead
from ..backbones.stock_run import without_dropout
from ..configuration import DiffusionBlocksConfig
from ..diffusion.objectives import IGNORED, num_counted
from ..diffusion.randomness import Generators
from .base import DiffusionBlocksPreTrainedModel, Formulation
from .block import Block
from .noisy_label import NoisyLabelToken
from .targets import FixedTargets


@dataclass
class WalkClassifierOutput(ModelOutput):
    """What `predict` of a classifier returns.

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


class LocalClasses(Formulation):
    """Blocks of the plain model, each trained on the cross-entropy of the class: a block starts from what the blocks before
    it made of the image. There is no noise: at the paper's highest level, where the label is out of sight, this is what its
    denoiser learns. In use it is the plain model.
    """

    passes_on = runs_stock = True

    def train(self, block: Block, x: Mapping, labels: torch.Tensor, block_input: Any, noise: Mapping):
        """What has left a block, `[N, S, D]`, and its logits `[N, V]`.

        Raises:
            ValueError: `noise` says a level or a draw.
        """
        for name in ("sigma", "noise"):
            if noise.get(name) is not None:
                raise ValueError(f"{name} must be None with preset='recommended': blocks of classes have no noise there")
        return block.classify(x, block_input)

    def predict(self, x: Mapping, labels: torch.Tensor | None = None, **stock) -> ImageClassifierOutput:
        """What the plain model gives. (Not its loss: shares of classes it would take for classes of their own.)"""
        num_items = stock.pop("num_items_in_batch", None)
        found = self.model.backbone(**x, **self.model.asked_of_stock_model(stock))
        if labels is None:
            return found
        return type(found)(loss=self.model.mean_loss(found.logits, labels, num_items), **found)

    def block_logits(self, x: Mapping) -> torch.Tensor:
        """Every block's, `[N, B, V]`."""
        entering, found = None, []
        for block in self.model.blocks:
            entering, logits = block.classify(x, entering)
            found.append(logits)
        return torch.stack(found, dim=1)

    def trajectory(self, x: Mapping, num_steps: int | None, generator) -> tuple[torch.Tensor, torch.Tensor, None]:
        """The last block's logits `[N, V]`, what the blocks say in turn, `[N, B, V]` probabilities, and no levels.

        Raises:
            ValueError: steps, or noise, are asked for.
        """
        for name, value in (("num_inference_steps", num_steps), ("generator", generator)):
            if value is not None:
                raise ValueError(f"{name} must be None with preset='recommended': nothing walks to a class")
        logits = self.block_logits(x)
        return logits[:, -1], logits.float().softmax(-1), None


class DiffusionBlocksClassifier(DiffusionBlocksPreTrainedModel):
    """A classifier whose blocks tell the class, each by itself.

    Raises:
        ValueError: the plain model tells no single class of several.
    """

    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every row of a step counts alike
    copied_modules = ("noisy_labels",)

    def __init__(self, config: DiffusionBlocksConfig):
        _check_problem(config)
        super().__init__(config)
        if self.formulation.modulated:
            self.label_embeddings = FixedTargets(config.num_labels, config.hidden_size)
            copies = range(self.sharing.num_copies)
            self.noisy_labels = nn.ModuleList(NoisyLabelToken(config.hidden_size) for _ in copies)
        if not self.architecture.layers_are_alike:  # the last block is read out as the stock model is
            widths = self.architecture.stages(config.source_config).widths
            ends = [widths[block.layer_indices[-1]] for block in self.blocks[:-1]]
            self.local_heads = nn.ModuleList(StageHead(width, config.num_labels) for width in ends)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoisyLabelToken):
            init.zeros_(module.position)
        elif isinstance(module, StageHead):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def _classify(
        self, x: Mapping[str, Any], labels: torch.Tensor | None, block_index: int | None, block_input: torch.Tensor | None,
        draws: Mapping[str, Any], num_items: torch.Tensor | int | None, stock: dict[str, Any],
    ) -> ImageClassifierOutput:  # fmt: skip
        """What `forward` does, of what the stock model takes."""
        self.check_block_given(block_index, labels)
        labels = None if labels is None else self._checked(labels, len(next(iter(x.values()))))
        if block_index is None:
            self.refuse({**draws, "block_input": block_input}, "without block_index: it is of a block that trains")
            if num_items is not None:
                stock["num_items_in_batch"] = num_items
            return self.formulation.predict(x, labels=labels, **stock)
        self.refuse(stock, "with block_index, which has a loss of its own: leave it out of the batch")
        leaving, logits = self.formulation.train(self.blocks[block_index], x, labels, block_input, draws)
        loss = self.mean_loss(logits, labels, num_items)
        leaving = tree_map_only(torch.Tensor, torch.Tensor.detach, leaving)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=(leaving,))

    def mean_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items) -> torch.Tensor:
        """The cross-entropy of those that have a label: their mean, or, of a micro-batch, its part of the mean over the
        step's `num_items`."""
        total = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
        return total / num_counted(self.counted_labels({"labels": labels}), num_items, self.training)

    def counted_labels(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One a row, also of shares."""
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
                f"up to 1, [{num_rows}, {self.config.num_labels}]: several classes of a row at once are for the plain model"
            )
        return labels

    def _predict(
        self, x: Mapping[str, Any], num_inference_steps: int | None = None, generator: Generators = None
    ) -> WalkClassifierOutput:
        with torch.no_grad(), without_dropout(self):
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
