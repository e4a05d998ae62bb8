"""Stock models whose training steps are followed: how one is made, what it is fed, what its loss is."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backbones.base import Backbone
from ..streaming.layers import find_layers
from ..tasks import TASKS, Task, backbone_for, task_of

#: What is estimated of architectures that are not cut into blocks: task -> what makes the model
STOCK_CLASSES = {"text-generation": AutoModelForCausalLM, "image-classification": AutoModelForImageClassification}


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
        return None if self.task is None else backbone_for(self.config, self.task_name)

    @property
    def takes_sequence_length(self) -> bool:
        return TASKS[self.task_name].takes_sequence_length

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

    def batch(self, num_rows: int, sequence_length: int | None) -> dict[str, torch.Tensor]:
        """Random inputs and labels."""
        return TASKS[self.task_name].example(self.config, num_rows, sequence_length)

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
    task = cut_task(config, task_name)
    if task is not None:
        return Stock(config, task.name, task)
    served = [name for name, auto_class in STOCK_CLASSES.items() if type(config) in auto_class._model_mapping]
    if task_name in served or (task_name is None and served):
        return Stock(config, task_name or served[0], None)
    if not served:
        raise ValueError(
            f"model_type={config.model_type!r} must be of a causal language model or an image classifier of Transformers"
        )
    raise ValueError(f"task={task_name!r} must be {', '.join(map(repr, served))} for model_type={config.model_type!r}")


def cut_task(config: PreTrainedConfig, task_name: str | None = None) -> Task | None:
    """The row of what a stock model can be cut into blocks for; None: it cannot be cut."""
    try:
        task = task_of(config, task_name)
        backbone = backbone_for(config, task.name)
        num_layers = backbone.num_layers(config)
        with torch.device("meta"):
            backbone.layers_path(backbone.make_plain(copy.deepcopy(config)), num_layers)
    except ValueError:
        return None
    return task


def layer_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of a model's layers, each with a dot at its end; of a DiffusionBlocks model, as the stock model inside has them."""
    return tuple(f"{name}." for name in find_layers(_stock_inside(model)))


def matrices_of_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What a model's layers map with, and adapters are for, by path. (Neither convolutions, nor what computes as it likes.)"""
    layers = layer_paths(model)
    inside = ((name, module) for name, module in model.named_modules() if name.startswith(layers))
    return {name: module for name, module in inside if type(module) in (nn.Linear, Conv1D)}


def num_logits(model: nn.Module) -> int | None:
    """The last dimension of a model's logits; None if it has none."""
    stock = _stock_inside(model)
    if not isinstance(stock, PreTrainedModel):  # of another library
        return None
    try:
        has_head = stock.get_output_embeddings() is not None
    except AttributeError:  # a job has not loaded it
        has_head = True
    return stock.config.get_text_config().vocab_size if has_head else stock.config.num_labels


def _stock_inside(model: nn.Module) -> nn.Module:
    return model.backbone if hasattr(model.config, "source_config") else model
