"""Image classification: x is the image's patches, y the L2-normalised embedding of its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ...configuration import DiffusionBlocksConfig
from ...diffusion.gaussian import BRIDGES, edm_loss_weight, posterior_logits, precondition
from ...diffusion.randomness import Generators, draw
from ...diffusion.samplers import NoiseSource, walk
from ..base import DiffusionBlocksPreTrainedModel, without_dropout
from ..targets import FixedTargets, TargetEmbedding


@dataclass
class WalkClassifierOutput(ModelOutput):
    """What [`DiffusionBlocksForImageClassification.predict`] returns.

    Args:
        logits: `[N, num_labels]` of the last evaluation.
        probabilities: their softmax.
        trajectory: `[N, T, num_labels]`, the probabilities after each evaluation.
        sigmas: `[T+1]` float64, the levels walked; the last one is not evaluated.
    """

    logits: torch.FloatTensor | None = None
    probabilities: torch.FloatTensor | None = None
    trajectory: torch.FloatTensor | None = None
    sigmas: torch.DoubleTensor | None = None


class NoisyLabelToken(nn.Module):
    """The noisy label as one more token of the sequence: `c_in z` plus a learned position."""

    def __init__(self, width: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, z: torch.Tensor, c_in: torch.Tensor) -> torch.Tensor:
        """`z [N, D]`, `c_in [N]` -> `[N, 1, D]`."""
        return (c_in[:, None] * z)[:, None, :].to(self.position.dtype) + self.position


class DiffusionBlocksForImageClassification(DiffusionBlocksPreTrainedModel):
    """A ViT whose blocks are denoisers of the label embedding (arXiv 2506.14202, appendix on image classification).

    Joint denoiser: the sequence is [CLS, patches, noisy label] and layers are modulated by sigma. Factorized: the
    layers see [CLS, patches] only. Either way the class is read from CLS.
    """

    main_input_name = "pixel_values"
    task = "image-classification"
    default_overlap = 0.05
    default_bridge = "soft"

    def __init__(self, config: DiffusionBlocksConfig):
        if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
            raise ValueError(
                f"problem_type={config.problem_type!r} with num_labels={config.num_labels} must be "
                "'single_label_classification' with at least 2 labels: the target is the embedding of one label"
            )
        super().__init__(config)
        targets = FixedTargets if self.per_block else TargetEmbedding
        self.label_embeddings = targets(config.num_labels, config.hidden_size)
        if config.denoiser == "joint":
            copies = config.num_blocks if self.per_block else 1
            self.noisy_labels = nn.ModuleList(NoisyLabelToken(config.hidden_size) for _ in range(copies))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoisyLabelToken):
            init.zeros_(module.position)

    # ---- one block

    def network(
        self, block_index: int, hidden: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, loss_block: int | None = None
    ) -> torch.Tensor:
        """F: logits `[N, V]` of one block's layers, given the hidden states that enter it, z `[N, D]`, sigma `[N]`."""
        if self.joint:
            self.use_block(block_index)
            c_in = precondition(sigma, self.sigma_data).input
            noisy_label = self.noisy_labels[block_index if self.per_block else 0]
            hidden = torch.cat([hidden, noisy_label(z, c_in)], dim=1)
        hidden = self.run_block(block_index, hidden, self.modulations_at(block_index, sigma))
        if loss_block not in (None, block_index):
            hidden, block_index = self.carry_on(hidden, block_index, loss_block), loss_block
        return self.read_out(block_index, self.run_local_head(block_index, hidden))

    def denoise(
        self, block_index: int, hidden: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, loss_block: int | None = None
    ) -> torch.Tensor:
        """Logits `[N, V]` of p(label | x, z) by one block: the network's, or their posterior given z."""
        logits = self.network(block_index, hidden, z, sigma, loss_block)
        if self.config.readout == "posterior":
            logits = posterior_logits(logits, z, sigma, self.label_embeddings.vectors())
        return logits

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
        block_input: torch.Tensor | None = None,
        loss_block: int | None = None,
    ) -> ImageClassifierOutput:
        """Train one block (`block_index` given), or classify.

        Args:
            pixel_values: `[N, C, H, W]`.
            labels: `[N]` class indices.
            block_index: the block to train. Its logits are those of p(label | x, z) with the true label inside z:
                their cross-entropy is a training loss, not a likelihood. Needs `labels`.
            sigma: noise levels `[N]` to train at; drawn for the block when None.
            noise: standard normal `[N, D]`; drawn when None.
            generator: of the draws; or one an image, N of them.
            interpolate_pos_encoding: as in the plain model.
            block_input: the hidden states `[N, S, D]` that enter the block, where the earlier blocks are not run but
                their output was cached.
            loss_block: the block that is read out, after those between have run, too (factorized, carried); None is
                `block_index` itself. Parameters between get gradients unless they ask for none.

        Returns:
            `loss` (with labels) and `logits`. Without `block_index` the logits are label-free: factorized and
            carried, the last block's prior; factorized and independent, the mean of the blocks' log-priors; joint,
            the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training.
        """
        if block_index is None:
            if self.training and labels is not None:
                raise ValueError(
                    "block_index=None in training: pass the block to train (DiffusionBlocksTrainer does), "
                    "or call model.eval() for the label-free loss"
                )
            logits = self._label_free_logits(pixel_values, interpolate_pos_encoding)
            loss = None if labels is None else F.cross_entropy(logits.float(), labels)
            return ImageClassifierOutput(loss=loss, logits=logits)
        if labels is None:
            raise ValueError(f"labels=None with block_index={block_index}: a block is trained on the noised label")

        loss_block = self.loss_block_of(block_index, loss_block)
        sigma, z = self._noised_labels(block_index, labels, sigma, noise, generator)
        inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        hidden = self.block_input(block_index, {**inputs, "block_input": block_input})
        logits = self.denoise(block_index, hidden, z, sigma, loss_block)
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        if self.config.loss_weighting == "edm":
            loss = loss * edm_loss_weight(sigma, self.sigma_data)
        return ImageClassifierOutput(loss=loss.mean(), logits=logits)

    def clean_inputs(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
        return {"pixel_values": batch["pixel_values"]}, {}

    def _noised_labels(self, block_index, labels, sigma, noise, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`sigma [N]` and `z = y + sigma eps [N, D]`, drawing what is not given."""
        if sigma is None:
            sigma = self.draw_sigma(block_index, (len(labels),), generator)
        if noise is None:
            shape = (len(labels), self.config.hidden_size)
            noise = draw(torch.randn, shape, generator)
        sigma, noise = (t.to(self.device, torch.float32) for t in (sigma, noise))
        return sigma, F.embedding(labels, self.label_embeddings.vectors()) + sigma[:, None] * noise

    def prior_logits(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Label-free logits of every block at sigma_max, `[N, B, num_labels]`.

        A joint network is fed the walk's (keyed) starting noise. Only block 0 trains at sigma_max by itself; the
        others do for `prior_fraction` of their draws.
        """
        inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        if self.joint:
            start = self._noise_source(len(pixel_values), None).normal(self.config.hidden_size)
            sigma = torch.full((len(pixel_values),), self.config.sigma_max, device=self.device)
            entering = self.block_inputs(inputs)
            logits = [self.network(k, hidden, sigma[:, None] * start, sigma) for k, hidden in enumerate(entering)]
        else:
            logits = [
                self.read_out(k, self.run_local_head(k, hidden)) for k, hidden in enumerate(self.clean_outputs(inputs))
            ]
        return torch.stack(logits, dim=1)

    def block_inputs(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Inference: the hidden states that enter each block, first block first."""
        if self.carried:
            return [self.embed(0, inputs), *self.clean_outputs(inputs)[:-1]]
        return [self.embed(k, inputs) for k in range(self.config.num_blocks)]

    def _label_free_logits(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        if self.joint:
            return self._walk(pixel_values, interpolate_pos_encoding)[0]
        if self.carried:
            inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
            return self.read_out(self.config.num_blocks - 1, self.clean_outputs(inputs)[-1])
        return self.prior_logits(pixel_values, interpolate_pos_encoding).log_softmax(-1).mean(1)

    # ---- the walk

    @torch.no_grad()
    def predict(
        self,
        pixel_values: torch.Tensor,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> WalkClassifierOutput:
        """Classify by walking from noise to a label, block by block.

        The walk *samples* p(label | x): for the most accurate single answer take the argmax of `model(x).logits`
        of a factorized model. With T = B steps each block runs once.

        Args:
            pixel_values: `[N, C, H, W]`.
            num_inference_steps: T; None is the config's, and then num_blocks.
            generator: of the walk's noise, independent for each row; None takes the keyed noise, equal for every row.
            interpolate_pos_encoding: as in the plain model.
        """
        with without_dropout(self):
            logits, trajectory, sigmas = self._walk(
                pixel_values, interpolate_pos_encoding, num_inference_steps, generator
            )
        return WalkClassifierOutput(
            logits=logits, probabilities=logits.float().softmax(-1), trajectory=trajectory, sigmas=sigmas
        )

    def _noise_source(self, num_rows: int, generator: torch.Generator | None) -> NoiseSource:
        return NoiseSource(num_rows, self.config.inference_seed, generator, self.device)

    def _walk(self, pixel_values, interpolate_pos_encoding, num_inference_steps=None, generator=None):
        config, targets = self.config, self.label_embeddings.vectors()
        if num_inference_steps is None:
            num_inference_steps = config.num_inference_steps or config.num_blocks
        sigmas = self.noise_schedule.inference_sigmas(num_inference_steps)
        if config.denoiser == "factorized":
            priors = self.prior_logits(pixel_values, interpolate_pos_encoding)
        else:
            inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
            entering = self.block_inputs(inputs)
        trajectory = []

        def denoise(z: torch.Tensor, step: int) -> torch.Tensor:
            block_index = int(self.noise_schedule.block_of(sigmas[step]))
            level = torch.full((len(z),), sigmas[step].item(), device=z.device)
            if config.denoiser == "factorized":  # the network does not depend on z: each block has run already
                logits = posterior_logits(priors[:, block_index], z, level, targets)
            else:
                logits = self.denoise(block_index, entering[block_index], z, level)
            trajectory.append(logits.float().softmax(-1))
            return logits

        noise = self._noise_source(len(pixel_values), generator)
        logits, _ = walk(denoise, targets, sigmas, noise, config.sampler, BRIDGES[self.bridge])
        return logits, torch.stack(trajectory, dim=1), sigmas
