"""The row of image generation in the table of tasks."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel

from ...backbones.dit import DiTConfig
from ...presets import PRESETS
from ...tasks import Generation, Task, gaussian_noise
from .command import ImageOptions, generate
from .model import DiffusionBlocksForImageGeneration


def example(config: DiTConfig, num_rows: int, sequence_length: None) -> dict[str, torch.Tensor]:
    """Random images `[N, C, H, W]` and classes `[N]`."""
    images = torch.randn(num_rows, config.in_channels, config.sample_size, config.sample_size)
    return {"pixel_values": images, "class_labels": torch.randint(config.num_embeds_ada_norm, (num_rows,))}


def plain_loss(model: nn.Module, pixel_values: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    """An L2 loss of the network's output, which holds what any diffusion loss holds."""
    timestep = torch.zeros(len(pixel_values), device=pixel_values.device)
    output = model(pixel_values, timestep, class_labels).sample
    return (output[:, : pixel_values.shape[1]] - pixel_values).square().mean()


IMAGE_GENERATION = Task(
    name=DiffusionBlocksForImageGeneration.task,
    model_class=DiffusionBlocksForImageGeneration,
    auto_class=AutoModel,
    example=example,
    takes_sequence_length=False,
    plain_loss=plain_loss,
    processor="none: a recipe prepares images, and the pipeline puts them out",
    load_processor=None,
    usage="images = model.predict(class_labels=[0, 1], num_inference_steps=50).images  # [N, C, H, W]",
    formulations=dict.fromkeys(PRESETS, gaussian_noise(overlap=0.05, num_inference_steps=50, label_dropout=0.1)),
    evaluation=dict.fromkeys(
        PRESETS,
        "A step of sampling runs the block that owns its noise level, and no other. In evaluation, "
        "`model(pixel_values, class_labels).loss` is the denoising loss over all noise levels.",
    ),
    generation=Generation(ImageOptions, generate),
    pipeline_tag="unconditional-image-generation",  # the Hub has no tag for images of a class
)
