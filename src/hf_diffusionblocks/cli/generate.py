"""`diffusionblocks generate`: images or text of a saved model, as its task does it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from ..configuration import option
from ..models.base import DiffusionBlocksPreTrainedModel
from ..streaming import stream_layers
from ..streaming.checks import check_device
from ..tasks import TASKS, Task
from .arguments import parse_verb
from .inspect import read_config


@dataclass
class GenerateArguments:
    seed: int | None = option(None, "Of what is drawn. Not given: the model's own (images), or a new one (text).")
    device: str | None = option(None, "Where the model runs. Not given: the accelerator if there is one, else the CPU.")
    stream: bool = option(False, "Have a layer or two on the device at a time, and the others in host memory.")


def run(args: list[str]) -> None:
    tasks = [task for task in TASKS.values() if task.generation is not None]
    place, options, source = parse_verb(
        "generate",
        [GenerateArguments, _options_of(tasks)],
        {"FOLDER": "folder or hub id of a DiffusionBlocks model, or folder of a pipeline around one"},
        args,
        description="Make images or text with a saved model. Some options are for images, some for text.",
    )
    # A saved pipeline of diffusers has the model in a folder of its own.
    folder = str(Path(source, "transformer")) if Path(source, "model_index.json").is_file() else source
    task = TASKS[read_config(folder).task]
    if task.generation is None:
        raise ValueError(f"{source} is a model for {task.name}, which generates nothing: pipeline({task.name!r}) runs it")

    device = check_device(place.device)

    def load() -> DiffusionBlocksPreTrainedModel:
        model = task.model_class.from_pretrained(folder)
        if place.stream:
            stream_layers(model, device)
        return model.to(device)

    task.generation.run(source, _own(options, task), place.seed, load)


def _options_of(tasks: Iterable[Task]) -> type:
    """A dataclass of the options of all tasks. One that several have is theirs together: each says what it means there."""
    options, helps = {}, {}
    for each in (each for task in tasks for each in fields(task.generation.options)):
        options[each.name] = each
        helps.setdefault(each.name, []).append(each.metadata["help"])
    made = [
        (name, each.type, field(default=each.default, metadata={"help": " ".join(helps[name])}))
        for name, each in options.items()
    ]
    return make_dataclass("GenerationOptions", made, namespace={"__module__": __name__})


def _own(options: Any, task: Task) -> Any:
    """The task's options; those of others must not be given."""
    names = [each.name for each in fields(task.generation.options)]
    for each in fields(options):
        value = getattr(options, each.name)
        if value != each.default and each.name not in names:
            allowed = ", ".join(f"--{name}" for name in names)
            raise ValueError(f"--{each.name} {value} is not for {task.name}, which has {allowed}")
    return task.generation.options(**{name: getattr(options, name) for name in names})
