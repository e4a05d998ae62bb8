"""A probe of depth: pointer chasing, whose accuracy by the number of hops says how many layers are used.

    python benchmarks/depth_probe.py --output outputs/depth_probe

A fresh Llama of 8 layers, width 64; a block of B=4 has 2. Ways to train are those of ladder.py, data are rows of
pointer_chasing.py, drawn as they are needed, none twice. Columns: held-out accuracy by hops and cross-entropy in nats of `logits`,
the accuracy at the most hops of each block (read out with its local head) and of the mean of the blocks'
log-probabilities; CPU seconds of training on one thread; how often a layer runs forward for one update of all
(of local heads, too), and the bytes of gradients and of what autograd keeps, in the step of the block that needs most.
Runs are cached in the output folder one by one, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from cached_runs import add_run_options, report, results_of
from ladder import LAYERS, ROWS, Row, new_model, new_trainer
from pointer_chasing import ELEMENTS, HOPS, LENGTH, PAIRS, VOCABULARY, PointerChasing, by_hops
from torch.nn import functional as F
from trained_ledgers import ledgers_of
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Trainer, set_seed
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils import logging

import hf_diffusionblocks as db

WIDTH, HEADS = 64, 2
HELD_OUT = 10**12  #: number of the first row to measure on


def source_of(row: Row) -> PreTrainedConfig:
    return LlamaConfig(
        num_hidden_layers=row.layers, hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_attention_heads=HEADS,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0, use_cache=False,
        initializer_range=0.1,  # with the usual 0.02 the second hop takes twice as long to learn
    )  # fmt: skip


def trainer_of(model: PreTrainedModel, row: Row, seed: int, settings: dict) -> Trainer:
    updates, batch_size = settings["updates"], settings["batch_size"]
    # As long for every row, so that all meet the rows in one order; those of a seed are no other seed's.
    rows = PointerChasing(seed * 10**9, updates * batch_size * LAYERS)
    return new_trainer(
        model, row, rows, updates, output_dir=settings["output"], per_device_train_batch_size=batch_size,
        learning_rate=settings["learning_rate"], adam_beta2=0.98, max_grad_norm=0.0, seed=seed,
    )  # fmt: skip


class LayerRuns:
    """How often layers of a model run forward, by their attention: blocks call the parts of a layer."""

    def __init__(self, model):
        self.count = 0
        for module in model.modules():
            if isinstance(module, LlamaAttention):
                module.register_forward_hook(self._add)

    def _add(self, *args) -> None:
        self.count += 1


def trained_bytes(trainer: Trainer) -> int:
    """Gradients and saved activations of a step, of the block that has most."""
    return max(ledger.parts.gradients + ledger.parts.activations for ledger in ledgers_of(trainer))


@torch.no_grad()
def read(model, rows: PointerChasing) -> dict:
    """Accuracy by hops: of `logits`, of each block, and of the mean of the blocks' log-probabilities."""
    batches = torch.utils.data.DataLoader(rows, 64, drop_last=True)  # equal batches: their means can be averaged
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        labels = batch.pop("labels")
        readings = {"logits": model(**batch).logits}
        if isinstance(model, db.DiffusionBlocksForCausalLM):
            priors = model.block_logits(**batch).log_softmax(-1)
            readings |= {"mean": priors.mean(1)} | {f"block {k}": prior for k, prior in enumerate(priors.unbind(1))}
        found = {name: by_hops(logits, labels) for name, logits in readings.items()}
        found["loss"] = F.cross_entropy(readings["logits"][:, PAIRS:-1].flatten(0, 1), labels[:, PAIRS + 1 :].flatten())
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value / len(batches)
    return {name: value.tolist() for name, value in totals.items()}


def run(job: tuple) -> None:
    name, seed, settings, file = job
    row = ROWS[name]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    set_seed(seed)
    model = new_model(row, source_of(row))
    trainer, layer_runs = trainer_of(model, row, seed, settings), LayerRuns(model)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    result = {"seconds": seconds, "layer runs": layer_runs.count / settings["updates"]}
    result |= read(model.eval(), PointerChasing(HELD_OUT, settings["held_out"]))
    result["step bytes"] = trained_bytes(trainer)
    kept = {key: settings[key] for key in ("updates", "learning_rate", "batch_size")}
    file.write_text(json.dumps({"row": name, "seed": seed, **kept, **result}))
    print(f"{name}, seed {seed}: {result}", flush=True)


# ---- the table

COLUMNS = (
    "", "seeds", *(f"{k} hop{'s' if k > 1 else ''}" for k in range(1, HOPS + 1)), "nats",
    f"{HOPS} hops by block", f"{HOPS} hops, mean of blocks", "CPU seconds", "layer runs an update",
    "gradients and activations",
)  # fmt: skip


def table(results: list[dict]) -> str:
    """Markdown: accuracies in per cent, means over seeds (of the most hops with their standard deviation)."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    guess = [f"{100 / (ELEMENTS - 1):.0f}"] * HOPS
    lines.append(f"| {' | '.join(['any element but the start', '', *guess, *[''] * (len(COLUMNS) - 2 - HOPS)])} |")
    for name in ROWS:
        if runs := [result for result in results if result["row"] == name]:
            lines.append(f"| {' | '.join(_cells(name, runs))} |")
    return "\n".join(lines)


def _cells(name: str, runs: list[dict]) -> list[str]:
    blocks = sum(key.startswith("block ") for key in runs[0])
    most = [_percent(runs, f"block {k}", HOPS - 1) for k in range(blocks)]
    spread = f" ± {statistics.stdev(100 * run['logits'][-1] for run in runs):.0f}" if len(runs) > 1 else ""
    return [
        name,
        str(len(runs)),
        *(_percent(runs, "logits", k) for k in range(HOPS - 1)),
        _percent(runs, "logits", HOPS - 1) + spread,
        f"{_mean(run['loss'] for run in runs):.3f}",
        " ".join(most),
        _percent(runs, "mean", HOPS - 1) if blocks else "",
        f"{_mean(run['seconds'] for run in runs):.0f}",
        f"{_mean(run['layer runs'] for run in runs):.1f}",
        f"{runs[0]['step bytes'] / 2**20:.1f} MiB",
    ]


def _percent(runs: list[dict], reading: str, hop: int) -> str:
    return f"{100 * _mean(run[reading][hop] for run in runs):.0f}"


_mean = statistics.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the cached runs and the table")
    parser.add_argument("--updates", type=int, default=2000, help="updates of every layer")
    parser.add_argument("--batch_size", type=int, default=16, help="cycles, of 32 queries each")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--held_out", type=int, default=512, help="cycles to measure on")
    add_run_options(parser, ROWS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("updates", "batch_size", "learning_rate", "held_out")}
    settings["output"] = str(options.output)
    results = results_of(run, ROWS, options.rows, options.seeds, settings, options.output, options.processes)
    report(results, table(results), options.updates, options.output)


if __name__ == "__main__":
    main()
