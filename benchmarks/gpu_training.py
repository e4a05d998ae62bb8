"""Checks of `benchmarks/gpu.py` that train: killed and resumed, with blocks in host memory, without waiting for the device.

python benchmarks/gpu_training.py FOLDER DEVICE NAME   # what the first of them kills
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks.tasks import backbone_for
from gpu_common import DIT, GPT2, LLAMA, LOCAL, PAPER, VIT, Family, Machine, Row, check, deterministic, equal, within

STEPS, KILLED_AFTER, SAVED_EVERY = 8, 5, 2
#: (A gradient that is nothing but rounding, as that of a bias of keys, moves its weight by nothing, rather than by a full step.)
OPTIMIZER = {"learning_rate": 1e-2, "adam_epsilon": 1e-4}
#: Name -> model, training arguments
RUNS = {
    "gpt2, in turn": (Family(GPT2, LOCAL), {"block_schedule": "random"}),
    "gpt2, together": (Family(GPT2, LOCAL), {"block_schedule": "together"}),
    "llama, together": (Family(LLAMA, LOCAL), {"block_schedule": "together"}),
    "llama, paper, in turn": (Family(LLAMA, PAPER), {"block_schedule": "random"}),
    "vit, paper, in turn": (Family(VIT, PAPER), {"block_schedule": "random"}),
    "dit, in turn": (Family(DIT, {"num_blocks": 2, "shared": "per_block"}), {"block_schedule": "random"}),
}


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [dict(zip(batch, row)) for row in zip(*batch.values())]


def trainer_of(model, batch: dict, folder: Path, device: torch.device, **arguments) -> Trainer:
    """The stock Trainer for a plain model, and ours for another, on one batch again and again; no logs."""
    ours = isinstance(model, db.DiffusionBlocksPreTrainedModel)
    types = (db.DiffusionBlocksTrainingArguments, db.DiffusionBlocksTrainer) if ours else (TrainingArguments, Trainer)
    rows = rows_of(batch)
    arguments = {"max_steps": STEPS, "save_strategy": "no", "max_grad_norm": 0.0, **arguments}
    if ours:
        arguments.setdefault("measure_memory", False)
    args = types[0](
        str(folder), per_device_train_batch_size=len(rows), use_cpu=device.type == "cpu", report_to=[], disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=device.type != "cpu", **arguments,
    )  # fmt: skip
    trainer = types[1](model=model, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(name: str, folder: Path, device: torch.device, resume: str | None = None, streamed: bool = False) -> dict:
    """The weights that a run ends with."""
    family, schedule = RUNS[name]
    model = family.model()
    if streamed:
        db.stream_layers(model, device)
    trainer = trainer_of(model, family.batch(), folder, device, **OPTIMIZER, **schedule)
    with deterministic():
        trainer.train(resume_from_checkpoint=resume)
    return {key: value.cpu() for key, value in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# ---- killed


class Killed(TrainerCallback):
    """As the machine would, without a word."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def run_to_be_killed(folder: str, device: str, name: str) -> None:
    family, schedule = RUNS[name]
    saving = {"save_strategy": "steps", "save_steps": SAVED_EVERY}
    trainer = trainer_of(family.model(), family.batch(), Path(folder), torch.device(device), **saving, **OPTIMIZER, **schedule)
    trainer.add_callback(Killed())
    with deterministic():
        trainer.train()


@check("killed and resumed", over={name: name for name in ("gpt2, in turn", "gpt2, together")})
def killed_and_resumed(machine: Machine, name: str, subject: str) -> Iterator[Row]:
    """Another process trains, and is killed; what goes on from its last checkpoint ends as one that nothing has stopped."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, str(machine.device), name]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run to be killed ended with {ended.returncode}: {ended.stderr[-300:]}")
        last = f"{folder}/checkpoint-{KILLED_AFTER // SAVED_EVERY * SAVED_EVERY}"
        resumed = trained(name, Path(folder), machine.device, resume=last)
        expected = trained(name, Path(folder) / "uninterrupted", machine.device)
    yield equal(f"killed and resumed: {name}", same(resumed, expected))


# ---- in host memory


@check("streamed blocks are the same", over={name: name for name in RUNS})
def streamed_blocks_are_the_same(machine: Machine, name: str, subject: str) -> Iterator[Row]:
    """Training blocks whose layers are streamed, and without. (The optimizer steps in host memory, by other instructions.)"""
    with tempfile.TemporaryDirectory() as folder:
        kept, moved = (trained(name, Path(folder), machine.device, streamed=streamed) for streamed in (False, True))
    off = max(((kept[key] - moved[key]).abs().max() / kept[key].abs().max().clamp(min=1e-6)).item() for key in kept)
    yield within(f"streamed blocks are the same: {name}", off, 1e-4)


# ---- without waiting


class Waits(TrainerCallback):
    """Counts, in the last steps of a run, what has the host wait for the device, by the place outside PyTorch that does."""

    def __init__(self, first_step: int):
        self.first_step, self.places, self._warnings = first_step, Counter(), warnings.catch_warnings()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:
            self._warnings.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._note
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == state.max_steps:
            torch.cuda.set_sync_debug_mode("default")
            self._warnings.__exit__(None, None, None)

    def _note(self, message, *args, **kwargs) -> None:
        if not str(message).startswith("called a synchronizing"):
            return
        frames = traceback.extract_stack()[:-1]
        passed = ("/torch/", "/warnings.py")
        outside = [frame for frame in frames if not any(part in frame.filename for part in passed)]
        place = (outside or frames)[-1]
        self.places[place.filename, place.lineno] += 1


def waits(model, batch: dict, machine: Machine, **arguments) -> tuple[Counter, Counter]:
    """Of the last four steps: in this package, and elsewhere."""
    counted, package = Waits(first_step=STEPS - 4), Path(db.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, batch, Path(folder), machine.device, **arguments)
        trainer.add_callback(counted)
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours, others = Counter(), Counter()
    for (file, line), count in counted.places.items():
        found = ours if Path(file).is_relative_to(package) else others
        found[f"{Path(file).name}:{line}"] += count
    return ours, others


@check("no waiting", needs_gpu=True, over=RUNS)
def no_waiting(machine: Machine, name: str, subject: tuple[Family, dict]) -> Iterator[Row]:
    """In a step, our code has the host wait for the device nowhere. Beside it, what the libraries do, there and in the stock
    Trainer's steps of the plain model."""
    family, schedule = subject
    batch = family.batch()
    ours, others = waits(family.model(), batch, machine, **schedule)
    places = "".join(f", {place} x {count}" for place, count in ours.items())
    yield Row(f"no waiting: {name}, our waits in 4 steps", f"{ours.total()}{places}", "0", not ours)
    places = "".join(f", {place} x {count}" for place, count in others.items())
    stock = ""
    if family.task.name in ("text-generation", "image-classification"):
        plain = backbone_for(family.config).make_plain(family.config)
        stock = f"; {waits(plain, batch, machine)[1].total()} in the plain model's steps"
    yield Row(f"no waiting: {name}, the libraries'", f"{others.total()}{places}{stock}")


if __name__ == "__main__":
    run_to_be_killed(*sys.argv[1:])
