"""The table of tasks: what a family of models brings, and what the rest of the house asks of it.

A family is its own files and a row here. Training, saving, memory, cards and the command line ask the row; none of them
knows a family. Rows are registered by [`families`](families.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .backbones.base import Backbone, backbone_for


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
        backbones: kinds of architectures that serve it. An architecture's usual task is the first row that it serves.
        example: `(plain config, rows, tokens a row or None) -> batch` of random inputs and labels, to measure memory with.
        num_positions: `(plain config, tokens a row or None)` -> positions S of the hidden states of one row.
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
    """

    name: str
    model_class: type[PreTrainedModel]
    auto_class: type
    backbones: tuple[type[Backbone], ...]
    example: Callable[[PreTrainedConfig, int, int | None], dict[str, torch.Tensor]]
    num_positions: Callable[[PreTrainedConfig, int | None], int]
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

    def serves(self, backbone: Backbone) -> bool:
        """Whether models of this architecture can be converted for this task."""
        return isinstance(backbone, self.backbones) and (backbone.tasks is None or self.name in backbone.tasks)


#: `Task.evaluation` of next tokens and classes
LABEL_FREE_LOGITS = {
    "recommended": "`model(...).logits` are the last block's, after all layers, as in the plain model: no diffusion runs at "
    "inference. This is block-local training.",
    "paper": "`model(...).logits` are the end of a walk from noise that is the same for every input.",
}
TASKS: dict[str, Task] = {}


def register_task(task: Task, config_class: type[PreTrainedConfig]) -> None:
    """Add a row, and have its Auto class load its models."""
    TASKS[task.name] = task
    task.auto_class.register(config_class, task.model_class, exist_ok=True)


def task_of(config: PreTrainedConfig, name: str | None = None) -> Task:
    """The row of a task; None is the usual one of the config's architecture.

    Args:
        config: of the plain model.

    Raises:
        ValueError: the architecture is not supported, or does not serve the task; says what is.
    """
    backbone = backbone_for(config)
    served = {task.name: task for task in TASKS.values() if task.serves(backbone)}
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        allowed = ", ".join(map(repr, served))
        raise ValueError(f"task={name!r} must be {allowed} for model_type={config.model_type!r}")
    return served[name]
