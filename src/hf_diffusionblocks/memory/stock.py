"""Stock models whose training steps are followed: how one is made, what it is fed, what its loss is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig

from ..backbones.base import BACKBONES, Backbone, backbone_for, backbone_of
from ..streaming.layers import find_layers
from ..tasks import Task, task_of

#: What is estimated of architectures that are not cut into blocks: task -> what makes the model
STOCK_CLASSES = {"text-generation": AutoModelForCausalLM, "image-classification": AutoModelForImageClassification}
IMAGE_SIZE = 224  #: where a config says none


@dataclass(frozen=True)
class Stock:
    """A stock model, before there is one.

    Args:
        config: of it.
        task_name: as in `pipeline(task)`.
        task: its row, where the architecture can be cut into blocks.
    """

    config: PreTrainedConfig
    task_name: str
    task: Task | None

    @property
    def architecture(self) -> Backbone | None:
        """How it is cut into blocks; None: it is not."""
        return None if self.task is None else backbone_for(self.config)

    @property
    def takes_sequence_length(self) -> bool:
        return self.task.takes_sequence_length if self.task else self.task_name == "text-generation"

    @property
    def num_layers(self) -> int | None:
        """Of what it stacks, where the config says it."""
        if self.architecture:
            return self.architecture.num_layers(self.config)
        return getattr(self.config.get_text_config(), "num_hidden_layers", None)

    def make(self) -> nn.Module:
        """The model, with weights as its class leaves them."""
        if self.architecture:
            return self.architecture.make_plain(self.config)
        return STOCK_CLASSES[self.task_name].from_config(self.config)

    def checkpoint_layers(self, model: nn.Module) -> None:
        """Have it compute the activations of its layers again in the backward pass, if it knows how to."""
        if self.architecture:
            self.architecture.checkpoint_layers(model)
        elif model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})

    def batch(self, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
        """Random inputs and labels."""
        if self.task:
            return self.task.example(self.config, num_rows, sequence_length)
        if self.takes_sequence_length:
            tokens = torch.randint(self.config.get_text_config().vocab_size, (num_rows, sequence_length))
            return {"input_ids": tokens, "labels": tokens}
        size = getattr(self.config, "image_size", None) or IMAGE_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(num_rows, getattr(self.config, "num_channels", 3), height, width)
        return {"pixel_values": images, "labels": torch.randint(self.config.num_labels, (num_rows,))}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's own, of a step that holds as much as any; of what has none that we could use, the task's."""
        if self.architecture:
            batch = batch | self.architecture.largest_step(self.config)
        if self.task and self.task_name not in STOCK_CLASSES:
            return self.task.plain_loss(model, **batch)
        if "use_cache" in inspect.signature(model.forward).parameters:
            batch = batch | {"use_cache": False}
        return model(**batch).loss


def stock_of(config: PreTrainedConfig, task_name: str | None = None) -> Stock:
    """The stock model of a config.

    Args:
        task_name: None is the architecture's usual one.

    Raises:
        ValueError: no model is known that does this.
    """
    if is_known(config):
        task = task_of(config, task_name)
        return Stock(config, task.name, task)
    served = [name for name, auto_class in STOCK_CLASSES.items() if type(config) in auto_class._model_mapping]
    if task_name in served or (task_name is None and served):
        return Stock(config, task_name or served[0], None)
    if not served:
        raise ValueError(
            f"model_type={config.model_type!r} must be of a causal language model or an image classifier of Transformers"
        )
    raise ValueError(f"task={task_name!r} must be {', '.join(map(repr, served))} for model_type={config.model_type!r}")


def is_known(config: PreTrainedConfig) -> bool:
    """Whether a stock model's layers can be cut into blocks."""
    try:
        return config.model_type in BACKBONES and bool(backbone_for(config))
    except ValueError:  # not with this config
        return False


def layer_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of a model's layers, each with a dot at its end: of a list of them, or of each."""
    config = getattr(model, "config", None)
    config = getattr(config, "source_config", config)
    if not isinstance(config, PreTrainedConfig):  # of another library
        return (f"{backbone_of(model).layers_path}.",)
    if is_known(config):
        return (f"{backbone_for(config).layers_path}.",)
    return tuple(f"{name}." for name in find_layers(model))


def num_logits(model: nn.Module) -> int | None:
    """The last dimension of a model's logits; None if it has none."""
    config = getattr(model.config, "source_config", model.config)
    if not isinstance(config, PreTrainedConfig):
        return backbone_of(model).num_logits(config)
    if is_known(config):
        return backbone_for(config).num_logits(config)
    head = model.get_output_embeddings()
    return config.num_labels if head is None else head.weight.shape[0]
