"""Fine-tuning a checkpoint: whole, with LoRA, with BAdam, and block by block, in one run.

    python benchmarks/finetune.py --data ../shared/data --output outputs/finetune --task gpt2

Tasks: a GPT-2 or Llama (8 layers, width 128) trained end to end on 20 authors of Project Gutenberg (3000 updates of 8 x 128
tokens), fine-tuned on works of Jonathan Swift, who is not among them (256,000 tokens), and read on another work of his; a ViT (6
layers, width 64) trained on five classes of Fashion-MNIST, fine-tuned with a new head on 8,000 images of the other five. Each
parameter gets 250 updates, so a method that trains B blocks in turn takes B times the steps (and moves what blocks share, where
that is trained, in all of them), and no parameter meets a row twice when blocks are trained one after another. What is read is the
*whole* model. Every method at the best of its learning rates.
Memory: the peak of the largest step, by the ledger. (BAdam's float32 copies, for half precision, are not counted.) Runs are
cached in the output folder. BAdam needs its package (`pip install badam`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from finetune_tasks import Clothes, Novels, Task
from peft import get_peft_model
from quality_images import collate
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db

RATES, LORA_RATES = (1e-3, 2e-3, 4e-3), (3e-3, 6e-3, 1e-2)

TOGETHER = {"block_schedule": "together"}

#: Method -> its kind, its learning rates, and what else it is given
METHODS: dict[str, tuple[str, tuple[float, ...], dict]] = {
    "full fine-tuning": ("plain", RATES, {}),
    "full fine-tuning, checkpointing": ("plain", RATES[1:2], {"activation_checkpointing": True}),
    "full fine-tuning, as many steps as blocks": ("plain", RATES[:2], {"in_turn": True}),
    "LoRA": ("lora", LORA_RATES, {}),
    "LoRA, checkpointing": ("lora", LORA_RATES[1:2], {"activation_checkpointing": True}),
    "LoRA, as many steps as blocks": ("lora", LORA_RATES[1:2], {"in_turn": True}),
    "BAdam": ("badam", RATES, {"in_turn": True}),
    "last block only": ("last", RATES, {}),
    "blocks, local loss": ("blocks", RATES, {}),
    "blocks, local heads of the last layers": ("blocks", RATES[1:], {"local_head_layers": 1}),
    "blocks together, local loss": ("together", RATES, TOGETHER),
}  # fmt: skip


class PeakMemory(TrainerCallback):
    """The largest total of the ledgers of a stock trainer's steps. (Ours keeps them by itself.)"""

    def __init__(self, trainer: Trainer):
        self.total, self._trainer, self._step = 0, trainer, trainer.training_step
        trainer.training_step = self._followed
        trainer.add_callback(self)

    def _followed(self, *args, **kwargs):
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        optimizer = getattr(optimizer, "base_optimizer", optimizer)  # BAdam's
        with db.StepMemory(self._trainer.model, optimizer) as self._memory:
            return self._step(*args, **kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.total = max(self.total, self._memory.ledger().total)


def make(kind: str, task: Task, rate: float, options: dict, seed: int = 0, turns: int | None = None) -> Trainer:
    """A method's trainer.

    Args:
        turns: updates of each parameter; None: the task's.
    """
    options = dict(options)
    in_turn = options.pop("in_turn", kind == "blocks")
    steps = (turns or task.updates) * (task.num_blocks if in_turn else 1)
    checkpointing = options.pop("activation_checkpointing", False)
    arguments = task.arguments(task.output / "run", steps, rate, activation_checkpointing=checkpointing, seed=seed)
    set_seed(seed)
    plain = task.checkpoint()
    if kind in ("plain", "lora", "badam", "last"):
        return _plain_trainer(kind, task, plain, arguments, rate, switch_every=min(50, turns or 50))
    heads = options.pop("local_head_layers", 0)
    model = db.convert(plain, task.num_blocks, local_head_layers=heads)
    options = {"train_shared": bool(task.head), "block_schedule": "random", **options}
    args = db.DiffusionBlocksTrainingArguments(**{**arguments, **options})
    collator = {"data_collator": collate} if isinstance(task, Clothes) else {}
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=task.train_set, **collator)


def _plain_trainer(kind: str, task: Task, model, arguments: dict, rate: float, switch_every: int) -> Trainer:
    optimizers = (None, None)
    if kind == "lora":
        config = task.lora()
        config.fan_in_fan_out = "c_attn" in task.lora_targets
        model = get_peft_model(model, config)
    elif kind == "last":
        trained = (*task.block_prefixes()[-1], *task.head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    elif kind == "badam":
        optimizers = (badam(model, task, rate, switch_every), None)
    return task.trainer(model, TrainingArguments(**arguments), task.train_set, optimizers=optimizers)


def badam(model, task: Task, rate: float, switch_every: int):
    from badam import BlockOptimizer

    base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    return BlockOptimizer(
        base, list(model.named_parameters()), block_prefix_list=task.block_prefixes(), switch_block_every=switch_every,
        switch_mode="random", active_modules=list(task.head), verbose=0,
    )  # fmt: skip


def run(method: str, rate: float, task: Task, name: str, seed: int) -> dict[str, float]:
    """Held-out loss (or error) after training with one rate, and seconds."""
    of_seed = f", seed {seed}" if seed else ""
    file = task.output / f"{name}, {method}, {rate:g}{of_seed}.json"
    if not file.is_file():
        kind, _, options = METHODS[method]
        trainer = make(kind, task, rate, options, seed)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        result = {"loss": task.held_out(trainer.model.eval()), "seconds": seconds}
        file.write_text(json.dumps(result))
        print(f"{file.stem}: {result}", flush=True)
    return json.loads(file.read_text())


def peak_bytes(method: str, task: Task, name: str) -> int:
    """What the largest step holds: of a short run, in which each block has two turns."""
    file = task.output / f"{name}, {method}, bytes.json"
    if not file.is_file():
        kind, rates, options = METHODS[method]
        trainer = make(kind, task, rates[0], options, turns=2)
        ours = isinstance(trainer, db.DiffusionBlocksTrainer)
        memory = None if ours else PeakMemory(trainer)
        trainer.train()
        total = max(ledger.total for ledger in trainer.ledgers.values()) if ours else memory.total
        file.write_text(json.dumps(total))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gutenberg/ and fashion_mnist/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints and the cached runs")
    parser.add_argument("--task", choices=["gpt2", "llama", "vit"], default="gpt2")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, the rate chosen by the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.task == "vit":
        task: Task = Clothes(options.data, options.output)
    else:
        task = Novels(options.task, options.data, options.output)
    start = task.held_out(task.checkpoint().eval())
    print(f"pretrained: {start:.4f}", flush=True)
    results = {}
    for method in options.methods:
        runs = {rate: run(method, rate, task, options.task, seed=0) for rate in METHODS[method][1]}
        rate = min(runs, key=lambda rate: runs[rate]["loss"])
        losses = [run(method, rate, task, options.task, seed)["loss"] for seed in range(options.seeds)]
        results[method] = {
            "loss": mean(losses), "spread": f" ± {stdev(losses):.4f}" if losses[1:] else "", "rate": rate,
            "seconds": runs[rate]["seconds"], "bytes": peak_bytes(method, task, options.task),
        }  # fmt: skip
    gain = start - results.get("full fine-tuning", {"loss": start - 1})["loss"]
    print(f"\n| | learning rate | {task.measure} | share of the full gain | MiB | seconds |\n|---|---|---|---|---|---|")
    print(f"| pretrained | | {start:.4f} | | | |")
    for method, result in results.items():
        share = 100 * (start - result["loss"]) / gain
        print(
            f"| {method} | {result['rate']:g} | {result['loss']:.4f}{result['spread']} | {share:.0f} % | "
            f"{result['bytes'] / 2**20:,.1f} | "
            f"{result['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
