"""Image generation: x is the class, y the image or latent, and z, the noisy image, is what a block reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from transformers import PreTrainedModel  # noqa: F401  diffusers looks for this name here, to load a pipeline's component
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ...configuration import DiffusionBlocksConfig
from ...diffusion.gaussian import corrupt, edm_loss_weight, precondition
from ...diffusion.randomness import Generators, check_generators, draw, keyed_generators
from ...diffusion.samplers import flow_on
from ...presets import PRESETS
from ...streaming import weights_on_device
from ...whole_numbers import whole
from ...backbones.stock_run import without_dropout
from ..base import DiffusionBlocksPreTrainedModel, Formulation
from ..block import Block

#: Sampler -> order of its method.
SAMPLERS = {"euler": 1, "heun": 2}
#: Classes of images, by number: one of them, or one an image.
ClassLabels = int | Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class ImageDenoiserOutput(ModelOutput):
    """What [`DiffusionBlocksForImageGeneration`] returns.

    Args:
        loss: w(sigma) L2, mean over the images; in evaluation, over all noise levels.
        block_losses: `[B]`, of each block's own range (evaluation).
        estimate: `[N, C, H, W]`, what the block takes the images for (training).
    """

    loss: torch.FloatTensor | None = None
    block_losses: torch.FloatTensor | None = None
    estimate: torch.FloatTensor | None = None


@dataclass
class GeneratedImages(ModelOutput):
    """What [`DiffusionBlocksForImageGeneration.predict`] returns.

    Args:
        images: `[N, C, H, W]`, on the scale of the training images, or latents.
        sigmas: `[T+1]` float64, the levels walked; the last one is not evaluated.
    """

    images: torch.FloatTensor | None = None
    sigmas: torch.DoubleTensor | None = None


class EndOfSampling(Exception):
    """Raised by `on_step`: no further step is made, and these are the images, `[N, C, H, W]`."""

    def __init__(self, z: torch.Tensor):
        super().__init__("sampling ends after this step")
        self.z = z


class NoisyImage(Formulation):
    """z is what the layers read: nothing meets it, and they know its noise level by themselves."""

    def estimate(self, block: Block, z: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """EDM's `D = c_skip z + c_out F(c_in z, c_noise)`, `[N, C, H, W]` float32, of z and levels `[N]`."""
        model = self.model
        c = precondition(sigma[:, None, None, None], model.config.sigma_data)
        # (Sinusoids of diffusers are made for 0 to 1000; c_noise spans [-1.6, 1.1].)
        conditions = {"timestep": 1000 * c.noise.flatten(), "class_labels": class_labels}
        hidden = block.run(block.embed({"pixel_values": c.input * z}), **conditions)
        with weights_on_device(block.layers[0]):
            condition = model.architecture.condition(block.layers[0], **conditions)
        patches = block.read_out(hidden, condition=condition)
        network = model.architecture.unpatchify(model.config.source_config, patches)
        return c.skip * z + c.out * network[:, : z.shape[1]].float()  # (a learned variance comes after the image)


class DiffusionBlocksForImageGeneration(DiffusionBlocksPreTrainedModel):
    """A DiT whose blocks are denoisers of images, each of its own range of noise (arXiv 2506.14202).

    A block gets the noisy image itself, and gives an image: nothing is handed from block to block but the image that a
    sampler improves, and a step of sampling runs one block.
    """

    main_input_name = "pixel_values"
    task = "image-generation"
    FORMULATIONS = dict.fromkeys(PRESETS, NoisyImage)

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self.post_init()

    @property
    def num_classes(self) -> int:
        """How many classes there are; a label of this number stands for none."""
        return self.config.source_config.num_embeds_ada_norm

    # ---- training and evaluation

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        block_index: int | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
        return_logits: bool | None = None,
        return_loss: bool = True,
    ) -> ImageDenoiserOutput:
        """Train one block (`block_index` given), or evaluate all of them.

        Args:
            pixel_values: `[N, C, H, W]` images or latents, of mean near 0 and standard deviation `config.sigma_data`.
            class_labels: `[N]`, or None for no class. In training a share of `config.label_dropout` is hidden.
            block_index: the block to train.
            sigma: noise levels `[N]` to train at; drawn for the block when None.
            noise: standard normal, like the images; drawn when None.
            generator: of the draws; or one an image, N of them.
            return_logits, return_loss: for all tasks alike; there are no logits.

        Returns:
            `loss` and `estimate` of the block. Without `block_index`, `loss` and `block_losses` on held-out images: each
            is denoised once by every block, at levels stratified over the batch and with noise that repeats.

        Raises:
            ValueError: the images are of another size, a label is beyond the table, or there is no block in training mode.
        """
        self.check_block_given(block_index, pixel_values)
        self._check_images(pixel_values)
        class_labels = self.checked_labels(class_labels, len(pixel_values))
        if block_index is None:
            return self._held_out(pixel_values, class_labels)
        block = self.blocks[block_index]
        sigma = self.draw_levels(block_index, (len(pixel_values),), sigma, generator)
        if self.training and self.config.label_dropout:
            hidden = draw(torch.rand, (len(pixel_values),), generator, self.device) < self.config.label_dropout
            class_labels = torch.where(hidden.to(self.device), self.num_classes, class_labels)
        loss, estimate = self._loss(block, pixel_values, class_labels, sigma, noise, generator)
        return ImageDenoiserOutput(loss=loss, estimate=estimate)

    def _loss(self, block, images, class_labels, sigma, noise, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """EDM's w(sigma) L2, each image with the weight of its own level, and the estimate."""
        sigma = sigma.to(self.device, torch.float32)
        images = images.to(self.device, torch.float32)
        flat_noise = None if noise is None else noise.flatten(1)
        z = corrupt(images.flatten(1), sigma, flat_noise, generator).unflatten(1, images.shape[1:])
        estimate = self.formulation.estimate(block, z, sigma, class_labels)
        loss = edm_loss_weight(sigma, self.config.sigma_data) * (estimate - images).square().mean((1, 2, 3))
        return loss.mean(), estimate

    def _held_out(self, images: torch.Tensor, class_labels: torch.Tensor) -> ImageDenoiserOutput:
        losses = []
        for block in self.blocks:
            rows = keyed_generators([self.config.inference_seed, block.index], range(len(images)))
            sigma = self.evaluation_levels(block.index, len(images))["sigma"]
            losses.append(self._loss(block, images, class_labels, sigma, None, rows)[0])
        losses = torch.stack(losses)
        return ImageDenoiserOutput(loss=losses.mean(), block_losses=losses)

    def evaluation_levels(self, block_index: int, num_rows: int) -> dict[str, torch.Tensor]:
        """The block's own range, stratified over the batch."""
        generator = keyed_generators([self.config.inference_seed], [block_index])[0]
        return {"sigma": self.noise_schedule.stratified(block_index, num_rows, generator).float()}

    def _check_images(self, pixel_values: torch.Tensor) -> None:
        size, channels = self.config.source_config.sample_size, self.config.source_config.in_channels
        if tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(f"pixel_values of {list(pixel_values.shape)} must be [N, {channels}, {size}, {size}]")

    def checked_labels(self, class_labels: ClassLabels | None, num_rows: int | None = None) -> torch.Tensor:
        """Labels `[N]` on the model's device; the number of classes stands for none.

        Raises:
            ValueError: a label is no whole number, or beyond the table, or there are not N.
        """
        if class_labels is None:
            return torch.full((num_rows,), self.num_classes, device=self.device)
        try:
            labels = torch.as_tensor(class_labels, device="cpu" if not torch.is_tensor(class_labels) else None)
        except (TypeError, ValueError, RuntimeError):
            labels = None
        if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"class_labels={class_labels!r} must be whole numbers, one an image")
        labels = labels.long().reshape(-1) if labels.dim() == 0 else labels.long()
        num_rows = len(labels) if num_rows is None else num_rows
        if labels.shape != (num_rows,) or not num_rows:
            raise ValueError(f"class_labels of {list(labels.shape)} must be [{num_rows or 'N'}], one an image")
        if labels.device.type == "cpu" and bool(((labels < 0) | (labels > self.num_classes)).any()):  # (no wait for a device)
            raise ValueError(
                f"class_labels={labels.tolist()} must lie in 0..{self.num_classes - 1}, or be {self.num_classes} for no class"
            )
        return labels.to(self.device)

    # ---- sampling

    @torch.no_grad()
    def denoise(
        self, z: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """What the blocks take noisy images for: each row by the block that owns its noise level.

        Args:
            z: `[N, C, H, W]`.
            sigma: `[N]`, or a number; float64 for levels that are boundaries.
            class_labels: `[N]`, or None for no class.
            guidance_scale: of classifier-free guidance, `D = D(none) + scale * (D(class) - D(none))`, where it is above 1;
                up to 1 there is none, as in diffusers: the class alone.

        Returns:
            `[N, C, H, W]` float32.

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").expand(len(z)).contiguous()
        class_labels, estimate = self.checked_labels(class_labels, len(z)), torch.empty_like(z, dtype=torch.float32)
        self.check_guidance(guidance_scale, class_labels)
        owners = self.noise_schedule.block_of(sigma)
        for k in owners.unique().tolist():
            rows = (owners == k).nonzero().squeeze(1).to(z.device)
            levels = sigma[owners == k].to(z.device, torch.float32)
            estimate[rows] = self._guided(k, z[rows].float(), levels, class_labels[rows], guidance_scale)
        return estimate

    def _guided(self, k: int, z, sigma, class_labels, guidance_scale: float) -> torch.Tensor:
        block = self.blocks[k]
        if guidance_scale <= 1:
            return self.formulation.estimate(block, z, sigma, class_labels)
        twice = torch.cat([class_labels, torch.full_like(class_labels, self.num_classes)])
        of_class, of_none = self.formulation.estimate(block, torch.cat([z, z]), sigma.repeat(2), twice).chunk(2)
        return of_none + guidance_scale * (of_class - of_none)

    def check_guidance(self, guidance_scale: float, class_labels: torch.Tensor) -> None:
        """Of labels from [`checked_labels`].

        Raises:
            ValueError: the scale is no finite number from 0; or it is above 1, and there is nothing to guide: no row of
                training had no class, or no image here has one.
        """
        is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
        if not (is_number and math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number from 0; up to 1 it guides nothing")
        if guidance_scale <= 1:
            return
        if not self.config.label_dropout:
            raise ValueError(
                f"guidance_scale={guidance_scale} must be at most 1: with label_dropout=0 the model has not learned what an "
                "image of no class is. If its training hid classes otherwise, set model.config.label_dropout to their share"
            )
        if class_labels.device.type == "cpu" and bool((class_labels == self.num_classes).all()):  # (no wait for a device)
            raise ValueError(f"guidance_scale={guidance_scale} must be at most 1 for images of no class: it guides to a class")

    def inference_sigmas(self, num_inference_steps: int | None = None, grid: str = "equal") -> torch.Tensor:
        """`[T+1]` float64, the levels that [`predict`] walks; arguments as there."""
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = whole("num_inference_steps", steps, 1, ", or None")
        return self.noise_schedule.inference_sigmas(steps, grid)

    @torch.no_grad()
    def predict(
        self,
        class_labels: ClassLabels | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        sampler: str = "euler",
        grid: str = "equal",
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        on_step: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> GeneratedImages:
        """Make images from noise. A step runs one block: 1/B of the layers.

        Args:
            class_labels: `[N]`, or one; None makes `num_images` of no class.
            num_images: N where there are no labels; None is 1.
            num_inference_steps: T; None is the config's, and then 50.
            guidance_scale: of classifier-free guidance. Above 1, a block denoises twice the rows; up to 1 there is none, as
                in diffusers: the class alone.
            sampler: "euler", or "heun": of second order, two evaluations a step (the second by the next level's block).
            grid: "equal" (all blocks run equally often) or "karras" (more steps at low noise).
            generator: of the first noise; or one an image. None: noise that is a function of `config.inference_seed` and an
                image's number.
            noise: the first noise itself, standard normal `[N, C, H, W]`; nothing is drawn.
            on_step: called with the step's number from 0 and z `[N, C, H, W]` float64 after it; may return another z, or
                raise [`EndOfSampling`].

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} must be one of {', '.join(map(repr, SAMPLERS))}")
        if class_labels is None or num_images is not None:
            num_images = 1 if num_images is None else whole("num_images", num_images, 1)
        class_labels = self.checked_labels(class_labels, num_images)
        self.check_guidance(guidance_scale, class_labels)
        check_generators(generator, num_images := len(class_labels))
        sigmas = self.inference_sigmas(num_inference_steps, grid)
        levels, order = sigmas.tolist(), SAMPLERS[sampler]

        def denoise(z: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.denoise(z, sigma, class_labels, guidance_scale).double()

        with without_dropout(self):
            z = levels[0] * self._first_noise(num_images, generator, noise)
            for step, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:])):
                is_last = step == len(levels) - 2  # (sigma_min is never evaluated)
                z = flow_on(denoise, z, sigma, sigma_next, 1 if is_last else order)
                try:
                    changed = on_step(step, z) if on_step is not None else None
                except EndOfSampling as end:
                    z = end.z
                    break
                z = z if changed is None else changed
        return GeneratedImages(images=z.float(), sigmas=sigmas)

    def _first_noise(self, num_images: int, generator: Generators, noise: torch.Tensor | None) -> torch.Tensor:
        """`[N, C, H, W]` standard normal, float64."""
        config = self.config.source_config
        shape = (num_images, config.in_channels, config.sample_size, config.sample_size)
        if noise is None:
            if generator is None:
                generator = keyed_generators([self.config.inference_seed], range(num_images))
            noise = draw(torch.randn, shape, generator)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise of {list(noise.shape)} must be {list(shape)}")
        return noise.to(self.device, torch.float64)
