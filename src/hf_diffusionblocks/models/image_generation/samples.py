"""Pictures of what a model makes, drawn while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.utils import logging

from ...extras import from_extra
from ...whole_numbers import check_whole

with from_extra("diffusers", "SampleImages", extra="diffusers"):
    from diffusers.image_processor import VaeImageProcessor

from .pictures import Image, image_grid

logger = logging.get_logger(__name__)

NUM_IMAGES = 16  #: if not told


class SampleImages(TrainerCallback):
    """Writes a grid of images every n optimizer steps, and one at the end of training, from the same noise each time.

    They are made from the averaged weights, where the Trainer keeps averages. TensorBoard and Weights & Biases get them,
    too, where the Trainer reports to these.

        trainer.add_callback(db.SampleImages(trainer, every_n_steps=500, class_labels=[0, 1, 2, 3]))

    Args:
        trainer: a [`DiffusionBlocksTrainer`] whose model makes images, gray or RGB.
        every_n_steps: 0 is at the end alone.
        class_labels: of the images, as in [`DiffusionBlocksForImageGeneration.predict`], in the order of a square grid, row
            by row; None is 16 images of no class.
        num_inference_steps, guidance_scale: as in `predict`.
        folder: of `step-00000500.png`, ... and `final.png`; None is `samples` in the output folder.

    Raises:
        ValueError: every_n_steps is negative, a label beyond the model's table, what the model makes no picture, or an
            option one that `predict` refuses.
    """

    def __init__(
        self,
        trainer: Trainer,
        every_n_steps: int = 0,
        class_labels: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        folder: str | PathLike | None = None,
    ):
        check_whole("every_n_steps", every_n_steps, 0)
        if (channels := trainer.model.config.source_config.in_channels) not in (1, 3):
            raise ValueError(f"in_channels={channels} must be 1 (grayscale) or 3 (RGB): latents are no picture")
        self._trainer, self.every_n_steps = trainer, every_n_steps
        labels = [trainer.model.num_classes] * NUM_IMAGES if class_labels is None else list(class_labels)
        trainer.model.check_guidance(guidance_scale, trainer.model.checked_labels(labels).cpu())
        trainer.model.inference_sigmas(num_inference_steps)
        self._options = {
            "class_labels": labels, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale
        }  # fmt: skip
        self.folder = Path(trainer.args.output_dir, "samples") if folder is None else Path(folder)
        self._writers: list = []  # of TensorBoard

    def on_train_begin(self, args, state, control, **kwargs):
        # Held on to: TensorBoardCallback lets go of its own at the end of training. (A closed one opens again.)
        trackers = self._trainer.callback_handler.callbacks
        self._writers = [each.tb_writer for each in trackers if isinstance(each, TensorBoardCallback) and each.tb_writer]
        model = self._trainer.model
        if len(model.resident_blocks) < model.num_blocks and state.is_world_process_zero:
            logger.warning(
                f"no samples are drawn: that takes all {model.num_blocks} blocks, and {model.resident_blocks} are loaded"
            )

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step < state.max_steps:
            self._draw(f"step-{step:08d}.png")

    def on_train_end(self, args, state, control, **kwargs):
        self._draw("final.png")

    def _draw(self, name: str) -> None:
        trainer, model = self._trainer, self._trainer.model
        if len(model.resident_blocks) < model.num_blocks:
            return
        if not trainer.is_world_process_zero():
            return
        with trainer.averaged_weights():
            images = model.predict(**self._options).images
        grid = as_grid(images)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / name)
        self._report(grid, trainer.state.global_step)

    def _report(self, grid: Image.Image, step: int) -> None:
        for writer in self._writers:
            writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
            writer.flush()
        if any(isinstance(each, WandbCallback) for each in self._trainer.callback_handler.callbacks):
            import wandb

            wandb.log({"samples": wandb.Image(grid), "train/global_step": step})


def as_grid(images: torch.Tensor) -> Image.Image:
    """One RGB picture of images `[N, C, H, W]` in [-1, 1], C of 1 or 3."""
    return image_grid([picture.convert("RGB") for picture in VaeImageProcessor().postprocess(images)])
