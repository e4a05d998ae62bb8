"""`diffusionblocks train`: `accelerate launch` of a task's recipe."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.resources import files
from subprocess import CalledProcessError
from typing import NoReturn

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..extras import from_extra
from .arguments import Parser

HELP = """\
usage: diffusionblocks train [ACCELERATE OPTIONS] TASK [--config FILE.yaml] [--option VALUE ...]

Train in blocks, or streamed: run a task's recipe by `accelerate launch`. What follows TASK is for the recipe
(`diffusionblocks train TASK --help` lists it); the exit status is the recipe's.

What precedes TASK is for accelerate, for example `--num_processes 2` or `--mixed_precision bf16`
(`accelerate launch --help` lists it).

  --accelerate_config FILE.yaml  what `accelerate config` wrote; may also follow TASK

tasks: {tasks}"""


def run(args: list[str]) -> None:
    recipes = find_recipes()
    if args[:1] in (["-h"], ["--help"]):
        print(HELP.format(tasks=", ".join(recipes)))
        return
    launch = _parse(args)
    if launch.training_script not in recipes:
        raise ValueError(f"TASK={launch.training_script!r} must be one of {', '.join(recipes)}")
    package, extra = ("trl", "sft") if launch.training_script == "finetune" else ("datasets", "recipes")
    with from_extra(package, "a recipe", extra):  # said here in one line, and not by each process
        version(package)
    launch.training_script = recipes[launch.training_script]
    try:
        launch_command(launch)
    except CalledProcessError as error:
        _exit_as(error.returncode)
    except ChildFailedError as error:  # of several processes, the first that failed
        _exit_as(error.get_first_failure()[1].exitcode)


def find_recipes() -> dict[str, str]:
    """Task -> its recipe: `train_<task>.py`; "finetune" -> `finetune.py`, and "finetune-<task>" -> `finetune_<task>.py`."""
    found = sorted(files("hf_diffusionblocks.recipes").iterdir(), key=lambda path: path.name)
    return {
        path.name.removeprefix("train_").removesuffix(".py").replace("_", "-"): str(path)
        for kind in ("train_", "finetune")
        for path in found
        if path.name.startswith(kind) and path.name.endswith(".py")
    }


def _parse(args: list[str]):
    """accelerate's namespace, with TASK in the place of the script."""
    own = Parser(prog="diffusionblocks train", add_help=False, allow_abbrev=False)
    own.add_argument("--accelerate_config")
    options, args = own.parse_known_args(args)
    if options.accelerate_config is not None:
        args = ["--config_file", options.accelerate_config, *args]
    launcher = launch_command_parser()
    launcher.error = own.error  # one line, as everywhere; accelerate's prints a screen of usage first
    for action in launcher._actions:
        if action.dest == "training_script":
            action.metavar = "TASK"  # as errors name it
        elif action.dest == "training_script_args":
            action.required = False
    return launcher.parse_args(args)


def _exit_as(status: int) -> NoReturn:
    # A process that a signal ended has its negative number, which a shell reports as 128 + number.
    sys.exit(status if status >= 0 else 128 - status)
