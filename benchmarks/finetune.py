"""Fine-tuning a checkpoint: whole, with LoRA, with BAdam, and block by block, in one run.

    python benchmarks/finetune.py --data ../shared/data/gutenberg --output outputs/finetune

A GPT-2 (8 layers, width 128) is trained end to end on 20 authors of Project Gutenberg (3000 updates of 8 x 128 tokens) and then
fine-tuned on works of Jonathan Swift, who is not among them (256,000 tokens; each parameter gets 250 updates, so a method that
trains B=4 blocks in turn takes 1000 steps, and no parameter meets a row twice when they are trained one after another).
Held-out: another work of his, nats a token of the *whole* model. Every method at the best of its learning rates. Memory: parameters and buffers,
gradients, optimizer state and saved activations of the largest step, counted. Runs are cached in the output folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from finetune_data import BATCH, LAYERS, UPDATES, ChunkedTrainer, Sequences, arguments, pretrained, tokens
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks import lora
from hf_diffusionblocks.memory import SavedActivations, gradient_bytes, optimizer_state_bytes

B = 4
FORMULATION = {"num_blocks": B, "denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]}
FULL_RATES, LORA_RATES = (3e-4, 1e-3, 2e-3), (1e-3, 3e-3, 6e-3)

#: Method -> its kind, its learning rates, and what else it is given
METHODS: dict[str, tuple[str, tuple[float, ...], dict]] = {
    "full fine-tuning": ("plain", FULL_RATES, {}),
    "LoRA": ("lora", LORA_RATES, {}),
    "BAdam": ("badam", FULL_RATES, {}),
    "last block only": ("blocks", FULL_RATES, {"train_blocks": [B - 1]}),
    "blocks, local loss": ("blocks", FULL_RATES, {}),
    "blocks, local loss, near the pretrained output": ("near", FULL_RATES[1:2], {"remove_unused_columns": False}),
    "blocks, local heads of the last layers": ("blocks", FULL_RATES[1:2], {"readout_layers": 1}),
    "blocks, final loss": ("blocks", FULL_RATES, {"objective": "final"}),
    "blocks, final loss, first to last": (
        "blocks", FULL_RATES[1:], {"objective": "final", "block_schedule": "sequential"}
    ),
    "blocks, final loss, checkpointing, first to last": (
        "blocks", FULL_RATES[1:2],
        {"objective": "final", "block_schedule": "sequential", "activation_checkpointing": True},
    ),
    "blocks, final loss, LoRA": ("blocks", LORA_RATES, {"objective": "final", "adapters": True}),
    "blocks, final loss, LoRA, first to last": (
        "blocks", LORA_RATES[1:], {"objective": "final", "adapters": True, "block_schedule": "sequential"}
    ),
    "blocks, local loss, LoRA": ("blocks", LORA_RATES[1:2], {"adapters": True}),
}  # fmt: skip


class Bytes(TrainerCallback):
    """The largest of the counted steps: the first ones, and some later."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.total, self.activations, self.trainer = model, 0, 0, None

    def counts(self, step: int) -> bool:
        return step < 2 * B or step % 50 == 1

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


class NearPretrained(db.DiffusionBlocksForCausalLM):
    """Adds the distance of the active block's output from the pretrained block's on the same input."""

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


def make(kind: str, plain, streams, output: Path, rate: float, options: dict):
    """A trainer of a method, and the model whose bytes count."""
    data = Sequences(streams["train"])
    if kind in ("plain", "lora", "badam"):
        steps = UPDATES * (B if kind == "badam" else 1)
        model = get_peft_model(plain, LoraConfig(**LORA, fan_in_fan_out=True)) if kind == "lora" else plain
        args = TrainingArguments(**arguments(output, steps, rate))
        optimizers = (badam(model, rate), None) if kind == "badam" else (None, None)
        return PlainTrainer(model=model, args=args, train_dataset=data, optimizers=optimizers), model
    options = dict(options)
    fields = {"readout_layers": options.pop("readout_layers", 0)}
    model = db.convert(plain, **FORMULATION, **fields)
    if fields["readout_layers"]:
        for head in model.readout_heads:
            head[0].load_state_dict(model.layer(LAYERS - 1).state_dict())
    if kind == "near":
        near = NearPretrained(model.config)
        near.load_state_dict(model.state_dict())
        near.pretrained = [copy.deepcopy(model).eval().requires_grad_(False)]
        model = near
    if options.pop("adapters", False):
        lora.add_block_adapters(model, LoraConfig(**LORA))
    steps = UPDATES * len(options.get("train_blocks", range(B)))
    args = db.DiffusionBlocksTrainingArguments(**arguments(output, steps, rate, train_shared=False, **options))
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=data), model


class PlainTrainer(ChunkedTrainer):
    """Of a plain model, also inside peft's."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        return super().compute_loss(plain, inputs, *args, **kwargs)


def badam(model, rate: float):
    from badam import BlockOptimizer

    base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    share = LAYERS // B
    prefixes = [[f"transformer.h.{layer}." for layer in range(k * share, (k + 1) * share)] for k in range(B)]
    return BlockOptimizer(
        base, list(model.named_parameters()), block_prefix_list=prefixes, switch_block_every=50, switch_mode="random",
        verbose=0,
    )  # fmt: skip


@torch.no_grad()
def held_out(model, streams: dict[str, torch.Tensor]) -> float:
    """Nats a token of the whole model."""
    model.eval()
    rows = Sequences(streams["held out"]).tokens
    total = sum(
        F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        for batch in rows.split(BATCH)
    )
    return total / rows[:, 1:].numel()


def run(method: str, rate: float, family: str, streams, output: Path) -> dict[str, float]:
    file = output / f"{family}, {method}, {rate:g}.json"
    if not file.is_file():
        set_seed(0)
        kind, _, options = METHODS[method]
        trainer, model = make(kind, pretrained(family, streams, output), streams, output / "run", rate, options)
        bytes_of = measured(trainer, model)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        result = {"loss": held_out(model, streams), "bytes": bytes_of.total, "seconds": seconds}
        file.write_text(json.dumps(result))
        print(f"{file.stem}: {result}", flush=True)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint and the cached runs")
    parser.add_argument("--family", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    streams = tokens(options.data, options.output)
    start = held_out(pretrained(options.family, streams, options.output), streams)
    print(f"pretrained: {start:.4f}", flush=True)
    results = {}
    for method in options.methods:
        runs = {rate: run(method, rate, options.family, streams, options.output) for rate in METHODS[method][1]}
        rate = min(runs, key=lambda rate: runs[rate]["loss"])
        results[method] = {**runs[rate], "rate": rate}
    best = start - results.get("full fine-tuning", {"loss": start - 1})["loss"]
    print("\n| | learning rate | held-out loss | share of the full gain | MiB | seconds |\n|---|---|---|---|---|---|")
    print(f"| pretrained | | {start:.4f} | | | |")
    for method, result in results.items():
        share = 100 * (start - result["loss"]) / best
        print(
            f"| {method} | {result['rate']:g} | {result['loss']:.4f} | {share:.0f} % | {result['bytes'] / 2**20:,.1f} | "
            f"{result['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
