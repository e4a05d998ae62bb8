"""Pins of what the Trainer does: whole runs, resumed ones, adapters, jobs, cached inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from digests import Pins, named_parameters
from grid import GRID, RECOMMENDED, converted, data_of, formulations_of, fresh
from of_files import logits, parts_of, weights_of
from peft import LoraConfig
from transformers import TrainerCallback

import hf_diffusionblocks as db
from hf_diffusionblocks import lora

#: What logs hold that is not seconds.
LOGGED = ("loss", "learning_rate", "grad_norm", "eval_loss", "step")
#: All that a run depends on.
ARGUMENTS = dict(
    max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.1,
    lr_scheduler_type="cosine", warmup_steps=1, optim="adamw_torch", max_grad_norm=1.0, seed=42, logging_steps=1,
    logging_strategy="steps", save_strategy="no", eval_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    dataloader_num_workers=0, bf16=False, fp16=False,
    block_schedule="random", block_switch_interval=1, train_blocks=None, train_shared=True, objective="local",
    offload_inactive_blocks="none", block_parallel=False, updates_per_block=None,
)  # fmt: skip


class Moved(TrainerCallback):
    """Notes which parameters have gradients before each update."""

    def __init__(self):
        self.names: list[list[str]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.names.append([name for name, p in named_parameters(model).items() if p.grad is not None])


def trainer_of(model, family: str, folder: Path, data=None, **arguments) -> db.DiffusionBlocksTrainer:
    arguments = {**ARGUMENTS, **arguments}
    if arguments["updates_per_block"] is not None:
        arguments["max_steps"] = -1
    args = db.DiffusionBlocksTrainingArguments(output_dir=str(folder), **arguments)
    data = data_of(family) if data is None else data
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=data, eval_dataset=data_of(family, 6))


def pin_run(pins: Pins, name: str, model, family: str, folder: Path, data=None, resume=None, **arguments):
    """A run: its losses and rates, what had gradients, the weights it ends with."""
    trainer, moved = trainer_of(model, family, folder, data, **arguments), Moved()
    trainer.add_callback(moved)
    torch.manual_seed(12)  # of what is not keyed: dropout
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    history = [
        {key: value for key, value in entry.items() if key in LOGGED or key.startswith("loss_block_")}
        for entry in trainer.state.log_history
    ]
    pins[f"{name}/logs"] = history
    pins[f"{name}/with gradients"] = moved.names
    pins[f"{name}/weights"] = trainer.model.state_dict()
    return trainer


def pin_training(pins: Pins, folder: Path) -> None:
    for family in ("gpt2", "vit"):
        for name, fields in formulations_of(family).items():
            full = f"{family}/{name}/train"
            trainer = pin_run(pins, full, converted(family, fields), family, folder / full)
            pins[f"{full}/evaluated"] = trainer.evaluate()["eval_loss"]
    for name, (family, fields, blocks, arguments) in RUNS.items():
        full = f"{family}/train {name}"
        pin_run(pins, full, converted(family, fields, num_blocks=blocks), family, folder / full, **arguments)
    for name, (family, fields, arguments) in RESUMED.items():
        full = f"{family}/resumed {name}"
        arguments = {**arguments, "save_strategy": "steps", "save_steps": 5}
        run = folder / full
        pin_run(pins, full, fresh(family, fields), family, run, **arguments)
        pins[f"{full}/checkpoint"] = weights_of(run / "checkpoint-5")
        again = converted(family, fields)  # other weights: all come from the checkpoint
        pin_run(pins, f"{full} again", again, family, run, resume=run / "checkpoint-5", **arguments)
    pin_adapters(pins, folder / "lora")
    pin_jobs(pins, folder / "jobs")
    pin_cached(pins, folder / "cached")


OFFLOAD, FINAL, SEQUENTIAL = {"offload_inactive_blocks": "cpu"}, {"objective": "final"}, {"block_schedule": "sequential"}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
#: Name -> family, fields, B, what differs from ARGUMENTS
RUNS: dict[str, tuple[str, dict, int, dict]] = {
    "recommended": ("llama", RECOMMENDED, 4, {}),
    "recommended, qwen3": ("qwen3", RECOMMENDED, 2, {}),
    "joint": ("llama", GRID["joint-edm-carried-own"], 4, {}),
    "sequential": ("gpt2", RECOMMENDED, 4, SEQUENTIAL),
    "sequential, joint": ("vit", GRID["joint-edm-independent"], 4, SEQUENTIAL),
    "turns of two": ("gpt2", GRID["factorized-carried"], 3, {"block_switch_interval": 2}),
    "updates a block": ("vit", GRID["factorized-independent"], 2, {"updates_per_block": 3, "seed": 7}),
    "final": ("gpt2", RECOMMENDED, 4, FINAL),
    "final, llama": ("llama", RECOMMENDED, 2, {**FINAL, **SEQUENTIAL}),
    "final, images": ("vit", RECOMMENDED, 4, FINAL),
    "final, own": ("gpt2", {**GRID["factorized-carried-own"], "prior_fraction": 1.0}, 2, FINAL),
    "final, dropout": ("gpt2-dropout", RECOMMENDED, 4, FINAL),
    "final, some noise": ("gpt2", GRID["factorized-carried"], 2, FINAL),
    "final, without what is shared": ("gpt2", RECOMMENDED, 4, {**FINAL, "train_shared": False}),
    "offloaded": ("gpt2", GRID["factorized-carried"], 4, OFFLOAD),
    "offloaded, joint": ("vit", GRID["joint-edm-independent-own"], 4, OFFLOAD),
    "offloaded, sequential, final": ("gpt2", RECOMMENDED, 4, {**OFFLOAD, **FINAL, **SEQUENTIAL}),
    "offloaded, evaluated": (
        "gpt2", GRID["joint-posterior-carried"], 4, {**OFFLOAD, "eval_strategy": "steps", "eval_steps": 4}
    ),
    "evaluated": ("vit", RECOMMENDED, 2, {"eval_strategy": "steps", "eval_steps": 4}),
    "checkpointed": ("gpt2-dropout", GRID["factorized-carried"], 2, CHECKPOINTED),
    "sgd": ("gpt2", GRID["joint-posterior-independent"], 2, {"optim": "sgd", "lr_scheduler_type": "linear"}),
}
RESUMED: dict[str, tuple[str, dict, dict]] = {
    "recommended": ("gpt2-dropout", RECOMMENDED, {}),
    "joint": ("vit-dropout", GRID["joint-edm-independent"], {}),
    "carried, own": ("llama", GRID["joint-posterior-carried-own"], SEQUENTIAL),
    "final, offloaded": ("gpt2", RECOMMENDED, {**FINAL, **OFFLOAD}),
}


def pin_adapters(pins: Pins, folder: Path) -> None:
    cases = {
        "gpt2": (RECOMMENDED, "local"), "llama": (RECOMMENDED, "final"), "qwen3": (RECOMMENDED, "local"),
        "vit": (RECOMMENDED, "final"),
    }  # fmt: skip
    for family, (fields, objective) in cases.items():
        name = f"{family}/lora"
        torch.manual_seed(13)
        model = lora.add_block_adapters(converted(family, fields), LoraConfig(r=4, lora_alpha=8))
        trainer = pin_run(pins, name, model, family, folder / family, max_steps=6, objective=objective)
        trainer.save_model(folder / family / "saved")
        pins[f"{name}/saved"] = weights_of(folder / family / "saved")
        again = lora.load_block_adapters(converted(family, fields), folder / family / "saved")
        pins[f"{name}/loaded/logits"] = logits(again, family)
        merged = lora.merge_and_unload(trainer.model)
        pins[f"{name}/merged"] = merged.state_dict()
        pins[f"{name}/merged/to_plain logits"] = logits(merged.to_plain(), family)


def pin_merged(pins: Pins, name: str, jobs: list[Path], output: Path) -> None:
    db.merge_blocks(jobs, output)
    pins[f"{name}/merged/files"] = sorted(path.name for path in output.iterdir())
    pins[f"{name}/merged/parts"] = parts_of(output)
    pins[f"{name}/merged/weights"] = weights_of(output)


JOBS = {"max_steps": -1, "updates_per_block": 3, "train_blocks": None}


def pin_jobs(pins: Pins, folder: Path) -> None:
    """A job a block that holds this block alone, and all of them merged."""
    own, frozen = {}, {"train_shared": False}
    cases = [
        ("gpt2", "factorized-independent-own", own), ("vit", "joint-edm-independent-own", own),
        ("llama", "joint-posterior-independent-own", own), ("llama", "factorized-independent", frozen),
        ("gpt2", "joint-edm-independent", frozen), ("vit", "factorized-independent", frozen),
    ]  # fmt: skip
    for family, formulation, arguments in cases:
        name, jobs = f"{family}/{formulation}/jobs", []
        for block in (0, 1):
            jobs.append(folder / name / str(block))
            model = fresh(family, GRID[formulation], [block])
            trainer = pin_run(pins, f"{name}/block{block}", model, family, jobs[-1], **{**JOBS, **arguments})
            pins[f"{name}/block{block}/evaluated"] = trainer.evaluate()["eval_loss"]
            trainer.save_model()
        pin_merged(pins, name, jobs, folder / name / "merged")


def pin_cached(pins: Pins, folder: Path) -> None:
    """Carried: the first block's job, what it makes of the data, a job of the second block on that, both merged."""
    cases = [
        ("gpt2", "factorized-carried-own", {}), ("vit", "factorized-carried", {"train_shared": False}),
        ("llama", "joint-edm-carried-own", {}),
    ]  # fmt: skip
    for family, formulation, arguments in cases:
        name, fields = f"{family}/{formulation}/cached", GRID[formulation]
        jobs = [folder / name / str(block) for block in (0, 1)]
        first = pin_run(
            pins, f"{name}/block0", fresh(family, fields, [0]), family, jobs[0], **{**JOBS, **arguments}
        )
        first.save_model()
        cached = db.cache_block_inputs(first.model, data_of(family), 1, folder / name / "cache", batch_size=4)
        pins[f"{name}/columns"] = sorted(cached.column_names)
        pins[f"{name}/inputs"] = torch.tensor(cached["input_of_block_1"][:])
        pins[f"{name}/made by"] = sorted(set(cached["predecessors_of_block_1"][:]))
        second = pin_run(
            pins, f"{name}/block1", fresh(family, fields, [1]), family, jobs[1], cached, **{**JOBS, **arguments}
        )
        second.save_model()
        pin_merged(pins, name, jobs, folder / name / "merged")
