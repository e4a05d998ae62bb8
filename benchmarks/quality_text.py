"""Language modelling quality: DiffusionBlocks beside end-to-end training, on novels of Project Gutenberg.

    python benchmarks/quality_text.py --data ../shared/data/gutenberg --output outputs/quality_text
    python benchmarks/quality_text.py --data ../shared/data/gutenberg --output outputs/quality_characters --characters \
        --families llama --width 96 --batch_size 16 --learning_rate 2e-3  # 27 symbols, where depth counts

One table a family: end to end, one block's depth, greedy local training, the paper's settings, then each improvement in
turn; equal updates per parameter of the blocks (with gradients through two blocks, where all but the last move in their
successor's steps, too, half as many steps). Columns are label-free cross-entropies in nats a token on
held-out novels, in bits with `--characters` ("logits": `model(...).logits`; "mean prior": the mean of all blocks' log-probabilities at sigma_max;
"over end to end": the better of the two), the diffusion's own bound, and CPU seconds of training on one thread. Runs are
cached in the output folder one by one, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from block_variants import TwoBlocks, TwoBlocksTrainer
from characters import ALPHABET, characters
from gutenberg import config_for, prepare
from torch.nn import functional as F
from trained_ledgers import ledgers_of
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.models.causal_lm.task import plain_loss

LAYERS = 8
PAPER = {"denoiser": "joint", "context": "independent"}
POSTERIOR = {**PAPER, "readout": "posterior"}
INFORMATION = {**POSTERIOR, "noise_distribution": "information"}
FACTORIZED = {**INFORMATION, "denoiser": "factorized"}
CARRIED = {**FACTORIZED, "context": "carried"}
LOCAL = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}

#: Row -> layers of a plain model, or what `convert` is given. "neighbours": gradients through two blocks; "together": all
#: blocks in every step; "layers": how many, where not LAYERS.
ROWS: dict[str, int | dict] = {
    "end to end": LAYERS,
    "end to end, one block's depth (B=4)": LAYERS // 4,
    "greedy local": LOCAL,
    "paper settings": PAPER,
    "+ posterior readout": POSTERIOR,
    "+ information-uniform noise": INFORMATION,
    "+ carried context": {**INFORMATION, "context": "carried"},
    "factorized, information-uniform, independent": FACTORIZED,
    "factorized, information-uniform, carried": CARRIED,
    "greedy local + local head of one layer": {**LOCAL, "readout_layers": 1},
    "greedy local + own head a block": {**LOCAL, "shared": "per_block"},
    "greedy local, gradients through two blocks": {**LOCAL, "neighbours": True},
    "end to end, one block's depth (B=2)": LAYERS // 2,
    "greedy local, B=2": {**LOCAL, "num_blocks": 2},
    "greedy local, B=2 + local head of one layer": {**LOCAL, "num_blocks": 2, "readout_layers": 1},
    "paper settings, B=2": {**PAPER, "num_blocks": 2},
    "half of the draws at sigma_max, half information-uniform": {**CARRIED, "prior_fraction": 0.5},
    "joint, information-uniform, carried, half at sigma_max": {
        **INFORMATION, "context": "carried", "prior_fraction": 0.5
    },
    "greedy local, together": {**LOCAL, "together": True},
    "greedy local + local head of one layer, together": {**LOCAL, "readout_layers": 1, "together": True},
    "exact gradient, together": {**LOCAL, "objective": "exact", "together": True},
    "greedy local + local head of one layer, B=2, together": {
        **LOCAL, "num_blocks": 2, "readout_layers": 1, "together": True
    },
    "greedy local + local head of one layer, own ends, together": {
        **LOCAL, "readout_layers": 1, "shared": "per_block", "together": True
    },
    "greedy local + local head of one layer, gradients through two blocks": {
        **LOCAL, "readout_layers": 1, "neighbours": True
    },
    "final loss, blocks in turn": {**LOCAL, "objective": "final"},
    "greedy local + local head of one layer, B=8, together": {
        **LOCAL, "num_blocks": 8, "readout_layers": 1, "together": True
    },
    "end to end, 12 layers": 12,
    "exact gradient, B=6 of 12 layers, together": {
        **LOCAL, "objective": "exact", "num_blocks": 6, "layers": 12, "together": True
    },
    "greedy local + local head of one layer, B=6 of 12 layers, together": {
        **LOCAL, "num_blocks": 6, "layers": 12, "readout_layers": 1, "together": True
    },
}  # fmt: skip
BOUND_BATCHES = 8  # of 8 sequences: the bound costs ten passes a sequence


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


def make_model(spec: dict, config):
    fields = {"num_blocks": 4, **spec}
    two_blocks = fields.pop("neighbours", False)
    for name in ("together", "layers"):
        fields.pop(name, None)
    model = db.convert(config, preset="paper", **fields)
    return TwoBlocks(model.config) if two_blocks else model


def train_and_read(row: str, family: str, seed: int, settings: dict) -> dict[str, float]:
    """Train one row and read it in every way it can be read."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = torch.load(settings["tokens"])
    if settings["characters"]:
        data = {split: tokens.long() for split, tokens in data.items()} | {"bytes_per_token": 1.0}
    train_set = Sequences(data["train"], settings["length"])
    test_set = Sequences(data["validation"][: settings["eval_tokens"]], settings["length"])
    spec = ROWS[row]
    set_seed(seed)
    layers = spec if isinstance(spec, int) else spec.get("layers", LAYERS)
    config = config_for(family, layers, settings["width"], settings["vocab_size"], settings["length"])
    shared_args = dict(
        output_dir=settings["output"], per_device_train_batch_size=settings["batch_size"], weight_decay=0.1,
        learning_rate=settings["learning_rate"], adam_beta2=0.95, lr_scheduler_type="cosine", warmup_steps=0.05,
        seed=seed, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    if isinstance(spec, int):
        model = AutoModelForCausalLM.from_config(config)
        args = TrainingArguments(max_steps=settings["updates"], **shared_args)
        trainer = ChunkedTrainer(model=model, args=args, train_dataset=train_set)
    else:
        model = make_model(spec, config)
        if model.config.noise_distribution == "information":
            db.fit_noise_schedule(model, torch.utils.data.DataLoader(train_set, settings["batch_size"]))
        schedule = "together" if spec.get("together") else "random"
        updates = settings["updates"] // 2 if spec.get("neighbours") else settings["updates"]
        args = db.DiffusionBlocksTrainingArguments(updates_per_block=updates, block_schedule=schedule, **shared_args)
        trainer_class = TwoBlocksTrainer if isinstance(model, TwoBlocks) else db.DiffusionBlocksTrainer
        trainer = trainer_class(model=model, args=args, train_dataset=train_set)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    step_bytes = max(ledger.total for ledger in ledgers_of(trainer))
    readings = read(model.eval(), test_set)
    if settings["characters"]:
        readings = {name: nats / math.log(2) for name, nats in readings.items()}
    return {**readings, "seconds": seconds, "step bytes": step_bytes, "bytes_per_token": data["bytes_per_token"]}


@torch.no_grad()
def read(model, test_set: Sequences) -> dict[str, float]:
    """Nats a token by each reading; a plain model has logits only."""
    batches = [{key: value for key, value in batch.items()} for batch in torch.utils.data.DataLoader(test_set, 8)]
    totals: dict[str, float] = {}
    for batch in batches:
        tokens = batch["input_ids"]
        readings = {"logits": model(tokens, use_cache=False).logits}
        if isinstance(model, db.DiffusionBlocksForCausalLM):
            priors = model.prior_logits(tokens).log_softmax(-1)
            readings["mean prior"] = priors.mean(1)
            readings |= {f"prior {k}": prior for k, prior in enumerate(priors.unbind(1))}
        for name, logits in readings.items():
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
            totals[name] = totals.get(name, 0.0) + loss.item()
    scored = len(test_set) * (test_set.tokens.shape[1] - 1)
    result = {name: total / scored for name, total in totals.items()}
    if isinstance(model, db.DiffusionBlocksForCausalLM):
        bound = db.nll_bound(model, batches[:BOUND_BATCHES], num_samples=8)
        result |= {"bound": bound.nats_per_token, "bound_error": bound.standard_error}
    return result


def run(job: tuple) -> None:
    row, family, seed, settings, result_file = job
    result = train_and_read(row, family, seed, settings)
    result_file.write_text(json.dumps({"row": row, "family": family, "seed": seed, **settings, **result}))
    print(f"{family}, {row}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()), flush=True)


def table(results: list[dict], family: str) -> str:
    """Markdown: nats a token, mean +- standard deviation over seeds; the better label-free reading over end to end."""
    lines = ["| | seeds | logits | mean prior | over end to end | bound | seconds |", "|---|---|---|---|---|---|---|"]
    of_row = {row: [r for r in results if r["row"] == row and r["family"] == family] for row in ROWS}
    base = _label_free(of_row["end to end"]) if of_row["end to end"] else math.nan
    for row, runs in of_row.items():
        if runs:
            over = f"{100 * (_label_free(runs) / base - 1):+.1f} %"
            cells = [_cell(runs, "logits"), _cell(runs, "mean prior"), over, _bound(runs), _cell(runs, "seconds")]
            lines.append(f"| {row} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _label_free(runs: list[dict]) -> float:
    return min(statistics.mean(run.get(name, math.inf) for run in runs) for name in ("logits", "mean prior"))


def _bound(runs: list[dict]) -> str:
    """Of many seeds their spread, of one the estimate's own standard error."""
    if len(runs) > 1 or "bound" not in runs[0]:
        return _cell(runs, "bound")
    return f"{runs[0]['bound']:.4g} ± {runs[0]['bound_error']:.2g}"


def _cell(runs: list[dict], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    digits = 0 if name == "seconds" else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cached runs and the table")
    parser.add_argument("--families", nargs="*", default=["gpt2", "llama"], choices=["gpt2", "llama"])
    parser.add_argument("--updates", type=int, default=2000, help="updates of every block")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--eval_tokens", type=int, default=24576)
    parser.add_argument("--characters", action="store_true", help="27 symbols instead of a BPE of --vocab_size tokens")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    if options.characters:
        options.vocab_size, tokens = len(ALPHABET), characters(options.data, options.output)
    else:
        tokens = prepare(options.data, options.output, options.vocab_size, train_bytes=24_000_000, eval_bytes=400_000)
    names = ("updates", "width", "length", "batch_size", "learning_rate", "vocab_size", "eval_tokens", "characters")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"output": str(options.output), "tokens": str(tokens)}
    jobs = []
    for seed in range(options.seeds):
        for family in options.families:
            for number, row in enumerate(ROWS):
                file = options.output / f"{family}-row{number:02}-seed{seed}-updates{options.updates}.json"
                if row in options.rows and not file.is_file():
                    jobs.append((row, family, seed, settings, file))
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(run, jobs):
            pass
    files = sorted(options.output.glob(f"*-row*-updates{options.updates}.json"))
    results = [json.loads(file.read_text()) for file in files]
    texts = [
        f"{family}, {LAYERS} layers, width {options.width}, {options.vocab_size} tokens; {options.updates} updates of "
        f"{options.batch_size} x {options.length} tokens; {'bits' if options.characters else 'nats'} a token:\n\n{table(results, family)}"
        for family in options.families
    ]
    (options.output / "table.md").write_text("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
