"""Language modelling quality where depth counts a little: text8-like characters of novels of Project Gutenberg.

    python benchmarks/quality_text.py --data ../shared/data/gutenberg --output outputs/quality_text

A fresh Llama of 8 layers, width 96; a block of B=4 has 2. Ways to train are those of ladder.py, on batches of 16 x 128
characters. Columns: bits a character on held-out novels, without labels, of `logits`, and of the mean of the blocks'
log-probabilities (read out with their local heads, if there are some), with the standard deviation over seeds; the better of the
two over end to end of as many layers, seed by seed; each block's own; CPU seconds of training on one thread; bytes of the step of
the block that holds most.
Runs are cached in the output folder one by one, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import statistics
import time

import torch
from cached_runs import parser_of, run_and_report, table_of
from characters import ALPHABET, characters
from gutenberg import config_for
from ladder import LAYERS, ROWS, new_model, new_trainer
from torch.nn import functional as F
from trained_ledgers import ledgers_of
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.models.causal_lm.task import plain_loss

WIDTH, LENGTH, BATCH_SIZE = 96, 128, 16


class ChunkedTrainer(Trainer):
    """The stock Trainer, with the readout in chunks."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with self.accelerator.autocast():  # (Accelerate casts in `forward`, of which this is no part)
            return plain_loss(model, labels=inputs["input_ids"], input_ids=inputs["input_ids"])


class Sequences(torch.utils.data.Dataset):
    """A stream of tokens, cut."""

    def __init__(self, tokens: torch.Tensor, length: int):
        self.tokens = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def run(job: tuple) -> None:
    name, seed, settings, file = job
    row = ROWS[name]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = {split: tokens.long() for split, tokens in torch.load(settings["characters"]).items()}
    set_seed(seed)
    model = new_model(row, config_for("llama", row.layers, WIDTH, len(ALPHABET), LENGTH))
    trainer = new_trainer(
        model, row, Sequences(data["train"], LENGTH), settings["updates"], ChunkedTrainer, output_dir=settings["output"],
        per_device_train_batch_size=BATCH_SIZE, learning_rate=settings["learning_rate"], weight_decay=0.1, adam_beta2=0.95,
        seed=seed,
    )  # fmt: skip
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    kept = {key: settings[key] for key in ("updates", "learning_rate", "held_out")}
    result = {"seconds": seconds, "step bytes": max(ledger.total for ledger in ledgers_of(trainer))}
    result |= bits(model.eval(), Sequences(data["validation"][: settings["held_out"]], LENGTH))
    file.write_text(json.dumps({"row": name, "seed": seed, **kept, **result}))
    print(f"{name}, seed {seed}: {result}", flush=True)


@torch.no_grad()
def bits(model: PreTrainedModel, rows: Sequences) -> dict[str, float]:
    """Bits a character: of `logits`, of each block, and of the mean of the blocks' log-probabilities."""
    totals: dict[str, float] = {}
    for batch in torch.utils.data.DataLoader(rows, 8):
        tokens = batch["input_ids"]
        readings = {"logits": model(tokens, use_cache=False).logits}
        if isinstance(model, db.DiffusionBlocksForCausalLM):
            priors = model.block_logits(tokens).log_softmax(-1)
            readings |= {"mean": priors.mean(1)} | {f"block {k}": prior for k, prior in enumerate(priors.unbind(1))}
        for reading, logits in readings.items():
            nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum").item()
            totals[reading] = totals.get(reading, 0.0) + nats
    scored = len(rows) * (LENGTH - 1)
    return {reading: nats / scored / math.log(2) for reading, nats in totals.items()}


# ---- the table

COLUMNS = (
    "", "seeds", "bits a character", "mean of the blocks", "over end to end", "by block", "CPU seconds",
    "memory of a training step",
)  # fmt: skip


def table(results: list[dict]) -> str:
    """Markdown; means over seeds."""
    return "\n".join(table_of(COLUMNS, ROWS, results, lambda name, runs: _cells(name, runs, results)))


def _cells(name: str, runs: list[dict], results: list[dict]) -> list[str]:
    blocks = sum(key.startswith("block ") for key in runs[0])
    return [
        name,
        str(len(runs)),
        _mean([run["logits"] for run in runs]),
        _mean([run["mean"] for run in runs]) if blocks else "",
        over_end_to_end(name, runs, results),
        " ".join(f"{statistics.mean(run[f'block {k}'] for run in runs):.3f}" for k in range(blocks)),
        f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        f"{runs[0]['step bytes'] / 2**20:.0f} MiB",
    ]


def over_end_to_end(name: str, runs: list[dict], results: list[dict]) -> str:
    """Per cent, of the seeds that both have."""
    plain = f"end to end, {ROWS[name].layers if ROWS[name].fields else LAYERS} layers"
    base = {result["seed"]: result["logits"] for result in results if result["row"] == plain}
    better = {run["seed"]: min(run["logits"], run.get("mean", math.inf)) for run in runs}
    shares = [100 * (better[seed] / base[seed] - 1) for seed in sorted(base.keys() & better.keys())]
    return f"{_mean(shares, '+.1f')} %" if shares and name != plain else ""


def _mean(values: list[float], form: str = ".3f") -> str:
    spread = f" ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> None:
    parser = parser_of(__doc__, ROWS, "train.parquet and validation.parquet")
    parser.add_argument("--updates", type=int, default=2000, help="updates of every layer")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--held_out", type=int, default=131072, help="characters to measure on")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("updates", "learning_rate", "held_out")}
    settings |= {"output": str(options.output), "characters": str(characters(options.data, options.output))}
    run_and_report(run, ROWS, table, options, settings)


if __name__ == "__main__":
    main()
