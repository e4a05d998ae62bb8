"""The row of image classification in the table of tasks."""

from __future__ import annotations

from math import isqrt

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ...backbones.base import Backbone
from ...backbones.staged import StagedBackbone
from ...tasks import LABEL_FREE_LOGITS, Task, a_step_a_block, gaussian_noise
from .model import DiffusionBlocksForImageClassification


IMAGE_SIZE = 224  #: where a config says none


def example(config: PreTrainedConfig, num_rows: int, sequence_length: None) -> dict[str, torch.Tensor]:
    """Random images `[N, C, H, W]`, or their tokens `[N, S]` (ImageGPT), or patches `[N, H * W, D]` (Siglip 2); labels `[N]`."""
    seen = getattr(config, "vision_config", config)
    channels, size = getattr(seen, "num_channels", 3), getattr(seen, "image_size", None) or IMAGE_SIZE
    if hasattr(seen, "n_positions"):
        images = {"input_ids": torch.randint(seen.vocab_size - 1, (num_rows, seen.n_positions))}
    elif not hasattr(seen, "image_size") and (side := isqrt(getattr(seen, "num_patches", 0))):
        images = {
            "pixel_values": torch.randn(num_rows, side**2, channels * seen.patch_size**2),
            "pixel_attention_mask": torch.ones(num_rows, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * num_rows),
        }
    else:
        images = {"pixel_values": torch.randn(num_rows, channels, *((size, size) if isinstance(size, int) else size))}
    return {**images, "labels": torch.randint(config.num_labels, (num_rows,))}


def plain_loss(model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
    """The plain model's own."""
    return model(**batch).loss


def make_backbone(stock_class: type[PreTrainedModel], config: PreTrainedConfig) -> Backbone | None:
    """Of stages, where a config says several depths, or not how many layers of which width there are. None: it takes other
    inputs than images."""
    if getattr(stock_class, "main_input_name", "pixel_values") not in ("pixel_values", "input_ids"):
        return None
    backbone = Backbone(stock_class)
    try:
        alike = not getattr(config, "depths", None) and backbone.num_layers(config) > 0 and backbone.width(config) > 0
    except ValueError:
        alike = False
    return backbone if alike else StagedBackbone(stock_class, example)


IMAGE_CLASSIFICATION = Task(
    name=DiffusionBlocksForImageClassification.task,
    model_class=DiffusionBlocksForImageClassification,
    auto_class=AutoModelForImageClassification,
    stock_auto_classes=(AutoModelForImageClassification,),
    example=example,
    takes_sequence_length=False,
    plain_loss=plain_loss,
    processor="image processor",
    load_processor=lambda source: AutoImageProcessor.from_pretrained(source),  # (without pillow it has no such method)
    usage='classify = pipeline("image-classification", model={name})  # label-free logits, like any classifier\n'
    "model.predict(pixel_values).trajectory  # what each block says in turn",
    formulations={"recommended": {"local_head_layers": 0}, "paper": gaussian_noise(overlap=0.05)},
    evaluation=LABEL_FREE_LOGITS,
    settle=a_step_a_block,
    make_backbone=make_backbone,
)
