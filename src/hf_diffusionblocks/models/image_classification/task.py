"""The row of image classification in the table of tasks."""

from __future__ import annotations

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ...backbones.base import Backbone
from ...backbones.staged import StagedBackbone
from ...tasks import LABEL_FREE_LOGITS, Task, a_step_a_block, gaussian_noise
from .model import DiffusionBlocksForImageClassification


IMAGE_SIZE = 224  #: where a config says none


def example(config: PreTrainedConfig, num_rows: int, sequence_length: None) -> dict[str, torch.Tensor]:
    """Random images `[N, C, H, W]` and labels `[N]`."""
    seen = getattr(config, "vision_config", config)
    size = getattr(seen, "image_size", None) or IMAGE_SIZE
    images = torch.randn(num_rows, getattr(seen, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    return {"pixel_values": images, "labels": torch.randint(config.num_labels, (num_rows,))}


def plain_loss(model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
    """The plain model's own."""
    return model(**batch).loss


def make_backbone(stock_class: type[PreTrainedModel], config: PreTrainedConfig) -> Backbone | None:
    """Of stages, where a config says several depths, or not how many layers of which width there are. None: it takes other
    inputs than images."""
    if getattr(stock_class, "main_input_name", "pixel_values") != "pixel_values":
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
