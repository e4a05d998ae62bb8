"""What recipes of plain models share, which say how much of a streamed model stays on the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from transformers import Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import parse
from hf_diffusionblocks.recipes import checks, common

KEEP = "With stream: how many layers stay on the device, or as many as fit into a budget such as 20GiB."


def check_keep(keep: str | None, stream: bool) -> None:
    """Raises ValueError if layers are to stay of a model that is not streamed."""
    if keep is not None and not stream:
        raise ValueError(f"keep={keep!r} needs stream: without it, all layers stay on the device")


def stream_keeping(model: torch.nn.Module, keep: str | None, device: torch.device) -> db.LayerStream:
    """Stream a model, of which so many layers stay on the device, or as many as fit into a budget; None: none."""
    keep = keep or "0"
    return db.stream_layers(model, device, keep=int(keep) if keep.isdigit() else keep)


def print_stream(trainer: Trainer, stream: db.LayerStream | None) -> None:
    """What a run has streamed, if anything."""
    if stream is not None:
        to_device, to_host = (number / 1e9 for number in stream.copied.values())
        trainer.accelerator.print(
            f"\nstreamed: {len(stream.units)} units, at most {stream.peak_units} on the device at once; "
            f"{to_device:.3g} GB copied there, {to_host:.3g} GB back"
        )


def run_streamed(
    prepare: Callable[..., tuple[Trainer, str | None, db.LayerStream | None]],
    types: Sequence[type],
    args: Sequence[str] | None,
    prog: str,
    description: str,
) -> dict[str, float]:
    """[`common.run`] of a recipe that trains a plain model, by arguments of its own.

    Args:
        prepare: also gives the stream, if there is one.
        types: all of the recipe's arguments, those of training last.
    """
    *given, training_args = parse(types, args, prog=prog, description=description)
    try:
        checks.begin(training_args)
        trainer, resume_from, stream = prepare(*given, training_args)
        checks.check_output(trainer)
    except common.BAD_INPUT as error:
        sys.exit(f"{prog}: error: {' '.join(str(error).split())}")
    metrics = common.train(trainer, resume_from)
    print_stream(trainer, stream)
    return metrics
