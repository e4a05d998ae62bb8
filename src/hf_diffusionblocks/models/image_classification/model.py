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
from ...diffusion.categorical import BRIDGES, posterior_logits
from ...diffusion.gaussian import corrupt
from ...diffusion.objectives import mean_of_step, weighted
from ...diffusion.randomness import Generators, NoiseSource
from ...diffusion.samplers import walk
from ...whole_numbers import whole
from ..active import without_dropout
from ..base import Clean, DiffusionBlocksPreTrainedModel
from ..targets import FixedTargets
from .denoisers import FactorizedImage, JointImage, NoisyLabelToken


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


class DiffusionBlocksForImageClassification(DiffusionBlocksPreTrainedModel):
    """A ViT whose blocks are denoisers of the label embedding (arXiv 2506.14202, appendix on image classification).

    Joint denoiser: the sequence is [CLS, patches, noisy label] and layers are modulated by sigma. Factorized: the
    layers see [CLS, patches] only. Either way the class is read from CLS.
    """

    main_input_name = "pixel_values"
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every image of a step counts alike
    task = "image-classification"
    DENOISERS = {"joint": JointImage, "factorized": FactorizedImage}
    clean_columns = ("pixel_values",)
    default_overlap = 0.05
    default_bridge = "soft"
    copied_modules = ("noisy_labels",)

    def __init__(self, config: DiffusionBlocksConfig):
        if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
            raise ValueError(
                f"problem_type={config.problem_type!r} with num_labels={config.num_labels} must be "
                "'single_label_classification' with at least 2 labels: the target is the embedding of one label"
            )
        super().__init__(config)
        self.label_embeddings = FixedTargets(config.num_labels, config.hidden_size)
        if self.denoiser.modulated:
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
            return_logits: for all tasks alike; logits of images are always returned.
            block_input: the hidden states `[N, S, D]` that enter the block, where the earlier blocks are not run but
                their output was cached.
            num_items_in_batch: images that the summed loss is divided by; None is those of this batch.

        Returns:
            `loss` (with labels) and `logits`; of a block also `hidden_states`, what has left it, without gradient (a tuple of
            one; factorized: `[N, S, D]`, for the next). Without `block_index` the logits are label-free: factorized and
            carried, the last block's prior; factorized and independent, the mean of the blocks' log-priors; joint,
            the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training.
        """
        self.check_block_given(block_index, labels)
        x = self._clean(pixel_values, interpolate_pos_encoding)
        if block_index is None:
            logits = self.denoiser.logits(x)
            loss = None if labels is None else F.cross_entropy(logits.float(), labels, reduction="none")
            loss = None if loss is None else mean_of_step(loss, num_items_in_batch)
            return ImageClassifierOutput(loss=loss, logits=logits)
        block, sees_z = self.blocks[block_index], self.sees_z(sigma)
        sigma = self.levels(block_index, labels, sigma, generator)
        targets = F.embedding(labels, self.label_embeddings.vectors())
        z = corrupt(targets, sigma, noise, generator) if sees_z else None
        leaving, read = self.denoiser.run(block, x, z, sigma, block_input)
        logits = self.readout(block.read_out(read), z, sigma)
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        loss = mean_of_step(weighted(loss, self.config.loss_weighting, sigma, self.sigma_data), num_items_in_batch)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=(leaving.detach(),))

    def levels(self, block_index: int, labels: torch.Tensor, sigma: torch.Tensor | None, generator) -> torch.Tensor:
        """Noise levels `[N]` float32: those given, or drawn for the block."""
        if sigma is None:
            sigma = self.draw_levels(block_index, (len(labels),), generator)
        return sigma.to(self.device, torch.float32)

    def readout(self, logits: torch.Tensor, z: torch.Tensor | None, sigma: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` of p(label | x, z) from a network's; without z, of p(label | x).

        "edm", the paper's: its layers have read z, and what they say is all. "posterior": it gives the prior, and z its
        likelihood, by Bayes' rule; at sigma_max z says nothing.
        """
        if self.config.readout == "edm":
            return logits
        if z is None:
            return logits.float()
        visible = torch.where(sigma < self.config.sigma_max, sigma, torch.inf)
        return posterior_logits(logits, z, visible, self.label_embeddings.vectors())

    def clean_input(self, batch: Mapping[str, torch.Tensor]) -> Clean:
        return self._clean(batch["pixel_values"], batch.get("interpolate_pos_encoding", False))

    def _clean(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> Clean:
        return Clean({"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}, {})

    def prior_logits(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Label-free logits of every block at sigma_max, `[N, B, num_labels]`.

        A joint network is fed the walk's (keyed) starting noise. Only block 0 trains at sigma_max by itself; the
        others do for `prior_fraction` of their draws.
        """
        return self.denoiser.prior_logits(self._clean(pixel_values, interpolate_pos_encoding))

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
            x = self._clean(pixel_values, interpolate_pos_encoding)
            logits, trajectory, sigmas = self.walk(x, num_inference_steps, generator)
        return WalkClassifierOutput(
            logits=logits, probabilities=logits.float().softmax(-1), trajectory=trajectory, sigmas=sigmas
        )

    def noise_source(self, num_rows: int, generator: torch.Generator | None = None) -> NoiseSource:
        """Where the noise of a walk comes from: keyed, or of a generator."""
        return NoiseSource(num_rows, self.config.inference_seed, generator, self.device)

    def walk(
        self, x: Clean, num_inference_steps: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, trajectory and sigmas of [`WalkClassifierOutput`]."""
        config, num_rows, trajectory = self.config, len(x.inputs["pixel_values"]), []
        steps = self.steps_for(config) if num_inference_steps is None else num_inference_steps
        sigmas = self.noise_schedule.inference_sigmas(whole("num_inference_steps", steps, 1, ", or None"))
        network = self.denoiser.walk_denoiser(x)

        def denoise(z: torch.Tensor, step: int) -> torch.Tensor:
            level = torch.full((num_rows,), sigmas[step].item(), device=z.device)
            logits = self.readout(network(int(self.noise_schedule.block_of(sigmas[step])), z, level), z, level)
            trajectory.append(logits.float().softmax(-1))
            return logits

        noise, targets = self.noise_source(num_rows, generator), self.label_embeddings.vectors()
        logits, _ = walk(denoise, targets, sigmas, noise, config.sampler, BRIDGES[self.bridge])
        return logits, torch.stack(trajectory, dim=1), sigmas
