"""The table of tasks: what a family of models brings, and what the rest of the house asks of it.

A family is its own files and a row here. Training, saving, memory, cards and the command line ask the row; none of them
knows a family. Rows are registered by [`families`](families.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from .backbones.base import Backbone
from .processors import load_tokenizer


def gaussian_noise(overlap: float, **others: Any) -> dict[str, Any]:
    """Fields of a formulation with Gaussian noise, and their defaults: EDM's and the paper's, and `others`."""
    return {
        "sigma_min": 0.002, "sigma_max": 80.0, "p_mean": -1.2, "p_std": 1.2, "sigma_data": 0.5, "overlap": overlap,
        "num_inference_steps": None, "inference_seed": 0, **others,
    }  # fmt: skip


def a_step_a_block(config: PreTrainedConfig) -> None:
    """The paper's number of steps to an answer, where it is not given."""
    if config.preset == "paper" and config.num_inference_steps is None:
        config.num_inference_steps = config.num_blocks


def stock_class(auto_class: type, config: PreTrainedConfig) -> type[nn.Module] | None:
    """What an Auto class of Transformers makes of a config, or of the composite that this is a part of; None: nothing."""
    mapping, kind, name = auto_class._model_mapping, type(config), model_type_to_module_name(config.model_type)
    found = mapping.get(kind, None) or (mapping.get(CONFIG_MAPPING[name], None) if name in CONFIG_MAPPING else None)
    found = found[0] if isinstance(found, tuple) else found
    return found if kind in mapping or found and found.config_class is kind else None


@dataclass(frozen=True)
class Generation:
    """How the command line generates with the models of a task.

    Args:
        options: a dataclass of options; a help begins with the kind of model it is for. Where it is not given, an option is
            None, a flag False. Tasks that have the same option name, type and default it alike.
        run: `(source, options, seed, load)` prints or writes what it generates. `source` is the saved model, or the folder
            of a pipeline around it; `load()` gives the model where it is to run, and is called once options are checked.
    """

    options: type
    run: Callable[[str, Any, int | None, Callable[[], PreTrainedModel]], None]


@dataclass(frozen=True)
class Task:
    """A row of the table.

    Args:
        name: as in `pipeline(name)`.
        model_class: the DiffusionBlocks model.
        auto_class: what loads it by `from_pretrained`, of transformers.
        stock_auto_classes: Auto classes of Transformers whose models can be cut for it, the usual one first; none: those that
            [`register_backbone`] names are all.
        example: `(plain config, rows, tokens a row or None) -> batch` of random inputs and labels, to measure memory with.
        takes_sequence_length: whether the caller says how many tokens a row has; otherwise the config does.
        plain_loss: `(plain model, **batch)` -> its loss, end to end.
        processor: what prepares its inputs, as users call it; it is saved beside the model.
        load_processor: `folder or hub id -> processor`; None where there is none.
        usage: lines of a model card's example, with `{name}` for the model's.
        formulations: preset -> the fields of [`DiffusionBlocksConfig`] that its formulation has, and their defaults.
        evaluation: preset -> what the model gives where no block is named, for the card.
        settle: `(config) -> None` fills in what a [`DiffusionBlocksConfig`] leaves to the family, or refuses what it says.
        fields_of_source: `folder or hub id, where on the Hub` -> fields that what is saved beside a plain model says.
        generation: what `diffusionblocks generate` does; None where the task generates nothing.
        pipeline_tag: what the Hub calls the task; None is `name`.
        make_backbone: `(stock class, plain config)` -> how it is cut, where [`register_backbone`] says no more; None: it is not.
    """

    name: str
    model_class: type[PreTrainedModel]
    auto_class: type
    example: Callable[[PreTrainedConfig, int, int | None], dict[str, torch.Tensor]]
    takes_sequence_length: bool
    plain_loss: Callable[..., torch.Tensor]
    processor: str
    load_processor: Callable[[str], Any] | None
    usage: str
    formulations: Mapping[str, Mapping[str, Any]]
    evaluation: Mapping[str, str]
    settle: Callable[[PreTrainedConfig], None] = lambda config: None
    fields_of_source: Callable[..., dict[str, Any]] = lambda source, **hub: {}
    generation: Generation | None = None
    pipeline_tag: str | None = None
    stock_auto_classes: tuple[type, ...] = ()
    make_backbone: Callable[[type[nn.Module], PreTrainedConfig], Backbone | None] = lambda stock, config: Backbone(stock)

    def backbone_of(self, config: PreTrainedConfig) -> Backbone | None:
        """How a plain model is cut into blocks for this task; None: its architecture does not serve it."""
        if known := _BACKBONES.get((config.model_type, self.name)):
            return known
        found = [stock_class(each, config) for each in self.stock_auto_classes]
        return next((self.make_backbone(each, config) for each in found if each), None)

    def presets_for(self, config: PreTrainedConfig) -> list[str]:
        """The formulations that an architecture which serves this task can have."""
        backbone = self.backbone_of(config)
        if "preset" in backbone.fixed_fields:
            return [backbone.fixed_fields["preset"]]
        found = []
        for preset in self.formulations:
            with suppress(ValueError):
                if self.model_class.FORMULATIONS[preset].modulated:
                    backbone.check_modulation(config)
                found.append(preset)
        return found

    def is_usual_for(self, config: PreTrainedConfig) -> bool:
        """Whether this is what the architecture is for."""
        usual = self.stock_auto_classes and stock_class(self.stock_auto_classes[0], config)
        return bool(usual) or (config.model_type, self.name) in _BACKBONES


#: What rows of text say alike.
OF_TEXT = {
    "takes_sequence_length": True, "processor": "tokenizer", "load_processor": load_tokenizer,
}  # fmt: skip
#: `Task.evaluation` of next tokens and classes
LABEL_FREE_LOGITS = {
    "recommended": "`model(...).logits` are the last block's, after all layers, as in the plain model: no diffusion runs at "
    "inference. This is block-local training.",
    "paper": "`model(...).logits` are the end of a walk from noise that is the same for every input.",
}
TASKS: dict[str, Task] = {}
#: `(model_type, task)` -> the backbone of an architecture of which more is known than its stock class.
_BACKBONES: dict[tuple[str, str], Backbone] = {}


def register_task(task: Task, config_class: type[PreTrainedConfig]) -> None:
    """Add a row, and have its Auto class load its models."""
    TASKS[task.name] = task
    task.auto_class.register(config_class, task.model_class, exist_ok=True)


def register_backbone(model_type: str, task_name: str, backbone: Backbone) -> None:
    """Say more of an architecture, for a task, than its stock class does."""
    _BACKBONES[model_type, task_name] = backbone


def task_of(config: PreTrainedConfig, name: str | None = None, plain: nn.Module | None = None) -> Task:
    """The row of a task; None is that of the stock model or, without one, of the class that the config names, or else the
    usual one of its architecture.

    Args:
        config: of the plain model.
        plain: the model itself, if it is there.

    Raises:
        ValueError: the architecture is not supported, or does not serve the task; says what is.
    """
    served = {task.name: backbone for task in TASKS.values() if (backbone := task.backbone_of(config))}
    if name is None and served:
        plain_name = type(plain).__name__ if plain is not None else (config.architectures or [None])[0]
        named = [of for of, backbone in served.items() if backbone.plain_name == plain_name]
        usual = [of for of in named or served if TASKS[of].is_usual_for(config)]
        return TASKS[[*usual, *named, *served][0]]
    if name is None:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported: it must be an architecture of Transformers that writes text, "
            "fills masks, or tells classes of texts or images, or a DiTTransformer2DModel of diffusers"
        )
    if name not in served:
        allowed = ", ".join(map(repr, served)) or "left out: the architecture serves none"
        raise ValueError(f"task={name!r} must be {allowed} for model_type={config.model_type!r}")
    return TASKS[name]


def backbone_for(config: PreTrainedConfig, task_name: str | None = None) -> Backbone:
    """How a plain model is cut into blocks for a task; None is the usual one of its architecture.

    Raises:
        ValueError: the architecture does not serve the task, or not with this config.
    """
    backbone = task_of(config, task_name).backbone_of(config)
    backbone.check(config)
    return backbone


def backbone_named(plain_name: str) -> Backbone:
    """The backbone of a stock class of another library, by its name.

    Raises:
        ValueError: it is not supported.
    """
    for backbone in _BACKBONES.values():
        if backbone.plain_name == plain_name:
            return backbone
    raise ValueError(
        f"{plain_name} cannot be cut into blocks, and must be a model of Transformers, or a DiTTransformer2DModel. (A U-Net, or "
        "a stack with long skips, hands on more than what leaves a layer; a stack of two kinds of layers has no blocks that "
        "are alike.)"
    )
