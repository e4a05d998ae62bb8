"""Fine-tuning a checkpoint: whole, with LoRA, with BAdam, and block by block, in one run.

    python benchmarks/finetune.py --data ../shared/data --output outputs/finetune --task gpt2

Tasks: a GPT-2 or Llama (8 layers, width 128) trained end to end on 20 authors of Project Gutenberg (3000 updates of 8 x 128
tokens), fine-tuned on works of Jonathan Swift, who is not among them (256,000 tokens), and read on another work of his; a ViT (6
layers, width 64) trained on five classes of Fashion-MNIST, fine-tuned with a new head on 8,000 images of the other five. Each
parameter gets 250 updates, so a method that trains B blocks in turn takes B times the steps, and no parameter meets a row twice
when blocks are trained one after another. What is read is the *whole* model. Every method at the best of its learning rates.
Memory: parameters and buffers, gradients, optimizer state and saved activations of the largest step, counted. Runs are cached in
the output folder. BAdam needs its package (`pip install badam`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from finetune_tasks import Clothes, Novels, Task
from peft import get_peft_model
from quality_images import collate
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks import lora
from hf_diffusionblocks.memory import SavedActivations, gradient_bytes, optimizer_state_bytes

FORMULATION = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
FULL_RATES, LORA_RATES = (3e-4, 1e-3, 2e-3), (1e-3, 3e-3, 6e-3)

#: Method -> its kind, its learning rates, and what else it is given
METHODS: dict[str, tuple[str, tuple[float, ...], dict]] = {
    "full fine-tuning": ("plain", FULL_RATES, {}),
    "LoRA": ("lora", LORA_RATES, {}),
    "BAdam": ("badam", FULL_RATES[1:], {}),
    "last block only": ("last", FULL_RATES[1:], {}),
    "blocks, local loss": ("blocks", FULL_RATES[1:], {}),
    "blocks, local loss, near the pretrained output": ("near", FULL_RATES[1:2], {"remove_unused_columns": False}),
    "blocks, local heads of the last layers": ("blocks", FULL_RATES[1:2], {"readout_layers": 1}),
    "blocks, final loss": ("blocks", FULL_RATES[1:2], {"objective": "final"}),
    "blocks, final loss, first to last": (
        "blocks", FULL_RATES[1:2], {"objective": "final", "block_schedule": "sequential"}
    ),
    "blocks, final loss, shared trained": ("blocks", FULL_RATES[1:2], {"objective": "final", "train_shared": True}),
    "blocks, final loss, LoRA": ("blocks", LORA_RATES, {"objective": "final", "adapters": True}),
}  # fmt: skip


class Bytes(TrainerCallback):
    """The largest of the counted steps: the first ones, and some later."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.total, self.activations, self.trainer = model, 0, 0, None

    def counts(self, step: int) -> bool:
        return step < 8 or step % 50 == 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = gradient_bytes(self.model.parameters())

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())}
        inner = getattr(optimizer, "optimizer", optimizer)
        states = optimizer_state_bytes(getattr(inner, "base_optimizer", inner))
        self.total = max(self.total, sum(held.values()) + self.gradients + states + self.activations)


def measured(trainer, model: torch.nn.Module):
    """A trainer whose steps are counted by [`Bytes`]."""
    bytes_of = Bytes(model)
    compute_loss = trainer.compute_loss

    def counted(*args, **kwargs):
        if not model.training or not bytes_of.counts(trainer.state.global_step):
            return compute_loss(*args, **kwargs)
        with SavedActivations(model.parameters()) as saved:
            loss = compute_loss(*args, **kwargs)
        bytes_of.activations = saved.bytes
        return loss

    trainer.compute_loss = counted
    trainer.add_callback(bytes_of)
    return bytes_of


class Near:
    """Of a model class: adds the distance of the active block's output from the pretrained block's on the same input."""

    def run_block(self, block_index, hidden, modulations, **attention):
        output = super().run_block(block_index, hidden, modulations, **attention)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                goal = self.pretrained[0].run_block(block_index, hidden, modulations, **attention)
            self.distance = F.mse_loss(output, goal) / goal.square().mean()
        return output

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        if self.training:
            result.loss = result.loss + self.distance
        return result


def make(kind: str, task: Task, rate: float, options: dict):
    """A trainer of a method, and the model whose bytes count."""
    plain, options, output = task.checkpoint(), dict(options), task.output / "run"
    if kind in ("plain", "lora", "badam", "last"):
        model = get_peft_model(plain, _lora(task)) if kind == "lora" else plain
        if kind == "last":
            trained = (*task.block_prefixes()[-1], *task.head)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(trained))
        steps = task.updates * (task.num_blocks if kind == "badam" else 1)
        args = TrainingArguments(**task.arguments(output, steps, rate))
        optimizers = (badam(model, task, rate), None) if kind == "badam" else (None, None)
        return task.trainer(model, args, task.train_set, optimizers=optimizers), model
    model = db.convert(plain, task.num_blocks, readout_layers=options.pop("readout_layers", 0), **FORMULATION)
    if kind == "near":
        near = type("NearPretrained", (Near, type(model)), {})(model.config)
        near.load_state_dict(model.state_dict())
        near.pretrained = [copy.deepcopy(model).eval().requires_grad_(False)]
        model = near
    if options.pop("adapters", False):
        lora.add_block_adapters(model, task.lora())
    steps = task.updates * task.num_blocks
    options.setdefault("train_shared", bool(task.head))
    args = db.DiffusionBlocksTrainingArguments(**task.arguments(output, steps, rate, **options))
    collator = {"data_collator": collate} if isinstance(task, Clothes) else {}
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=task.train_set, **collator), model


def _lora(task: Task):
    config = task.lora()
    config.fan_in_fan_out = "c_attn" in task.lora_targets
    return config


def badam(model, task: Task, rate: float):
    from badam import BlockOptimizer

    base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    return BlockOptimizer(
        base, list(model.named_parameters()), block_prefix_list=task.block_prefixes(), switch_block_every=50,
        switch_mode="random", active_modules=list(task.head), verbose=0,
    )  # fmt: skip


def run(method: str, rate: float, task: Task, name: str) -> dict[str, float]:
    file = task.output / f"{name}, {method}, {rate:g}.json"
    if not file.is_file():
        set_seed(0)
        kind, _, options = METHODS[method]
        trainer, model = make(kind, task, rate, options)
        bytes_of = measured(trainer, model)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        result = {"loss": task.held_out(model.eval()), "bytes": bytes_of.total, "seconds": seconds}
        file.write_text(json.dumps(result))
        print(f"{file.stem}: {result}", flush=True)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gutenberg/ and fashion_mnist/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints and the cached runs")
    parser.add_argument("--task", choices=["gpt2", "llama", "vit"], default="gpt2")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
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
        runs = {rate: run(method, rate, task, options.task) for rate in METHODS[method][1]}
        rate = min(runs, key=lambda rate: runs[rate]["loss"])
        results[method] = {**runs[rate], "rate": rate}
    gain = start - results.get("full fine-tuning", {"loss": start - 1})["loss"]
    print(f"\n| | learning rate | {task.measure} | share of the full gain | MiB | seconds |\n|---|---|---|---|---|---|")
    print(f"| pretrained | | {start:.4f} | | | |")
    for method, result in results.items():
        share = 100 * (start - result["loss"]) / gain
        print(
            f"| {method} | {result['rate']:g} | {result['loss']:.4f} | {share:.0f} % | {result['bytes'] / 2**20:,.1f} | "
            f"{result['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
