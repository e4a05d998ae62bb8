"""Masked diffusion of text: DiffusionBlocks beside end-to-end training, on characters of novels.

    python benchmarks/quality_masked.py --data ../shared/data/gutenberg --output outputs/quality_masked

27 symbols, a Llama of 6 layers, width 96, that attends both ways; equal updates of every parameter, 16 x 128 characters
each. Every row is measured by the likelihood bound in bits a character, on held-out works, with the same masks for all
rows, in all and by quarter of the masked share; differences from end to end are paired by text. Runs are cached in the
output folder one by one, so an interrupted benchmark goes on where it stopped. benchmarks/masked_sampling.py measures
what the models that are trained here write.
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
from quality_text import Sequences
from transformers import set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.masking import draw_masked
from hf_diffusionblocks.models.masked_lm.text import MaskedText

BATCH, LENGTH, WIDTH, MASK = 16, 128, 96, len(ALPHABET)
QUARTERS = 4
END_TO_END = "end to end, 6 layers"
#: Row -> layers in all, and what `convert` is given.
ROWS: dict[str, tuple[int, dict]] = {
    END_TO_END: (6, {"num_blocks": 1}),
    "end to end, 2 layers": (2, {"num_blocks": 1}),
    "B=3 of 2 layers (paper)": (6, {"num_blocks": 3}),
    "B=3 of 6 layers": (18, {"num_blocks": 3}),
    "B=3 of 2 layers, own ends": (6, {"num_blocks": 3, "shared": "per_block"}),
    "B=3 of 1, 2, 3 layers": (6, {"num_blocks": 3, "layers_per_block": [1, 2, 3]}),
}


def new_model(layers: int, fields: dict):
    plain = config_for("llama", layers, WIDTH, MASK + 1, LENGTH)
    return db.convert(plain, task="fill-mask", mask_token_id=MASK, preset="paper", **fields)


def train(model, updates: int, seed: int, train_set, settings: dict) -> None:
    args = db.DiffusionBlocksTrainingArguments(
        settings["output"], updates_per_block=updates, per_device_train_batch_size=BATCH, weight_decay=0.1,
        learning_rate=settings["learning_rate"], adam_beta2=0.95, lr_scheduler_type="cosine", warmup_steps=0.05, seed=seed,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, measure_memory=False,
    )  # fmt: skip
    db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=train_set).train()


def trained_model(row: str, seed: int, train_set, settings: dict):
    set_seed(seed)
    model = new_model(*ROWS[row])
    train(model, settings["updates"], seed, train_set, settings)
    return model.eval()


@torch.no_grad()
def bits_by_quarter(model, tokens: torch.Tensor) -> torch.Tensor:
    """Bits a character of the bound's count form, `[N, 4]`: the mean over l in each quarter of 1..L of the masked tokens'
    mean loss, by one draw of l a text and quarter. The mean of a row estimates the bound of its text."""
    generator = torch.Generator().manual_seed(0)
    maskable, found = torch.ones_like(tokens, dtype=torch.bool), []
    for quarter in range(QUARTERS):
        width = tokens.shape[1] // QUARTERS
        counts = quarter * width + torch.randint(1, width + 1, (len(tokens),), generator=generator)
        masked = draw_masked(counts, maskable, generator)
        sums = [losses_of(model, *texts) for texts in zip(tokens.split(64), masked.split(64))]
        found.append(torch.cat(sums) / counts / math.log(2))
    return torch.stack(found, 1)


def losses_of(model, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """`-ln p` of each text's masked tokens, summed, by the blocks that own their shares; `[N]`."""
    tokens, masked = tokens.to(model.device), masked.to(model.device)
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=model.device)
    for block, rows, hidden in model.answers(MaskedText(tokens).masked(masked, model.mask_token_id)):
        sums[rows] = model.sums_of_rows(block, hidden, tokens[rows], masked[rows])
    return sums.cpu()


def step_memory(row: str) -> int:
    """Peak bytes of a training step of the block that holds most, by the ledger."""
    model, tokens, peaks = new_model(*ROWS[row]).train(), torch.randint(MASK, (BATCH, LENGTH)), []
    for block in model.blocks:
        own = [*model.block_parameters(block.index), *model.shared_parameters()]
        model.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)
        loss = lambda k=block.index: model(tokens, labels=tokens, block_index=k).loss  # noqa: E731
        peaks.append(db.measure_memory(model, torch.optim.AdamW(own, fused=True), loss).total)
    return max(peaks)


def run(job: tuple) -> None:
    row, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = {split: tokens.long() for split, tokens in torch.load(settings["characters"]).items()}
    start = time.process_time()
    model = trained_model(row, seed, Sequences(data["train"], LENGTH), settings)
    seconds = time.process_time() - start
    model.save_pretrained(file.with_suffix(""))
    held_out = Sequences(data["validation"], LENGTH).tokens
    bits = bits_by_quarter(model, held_out[:: len(held_out) // settings["texts"]][: settings["texts"]])
    result = {"bits": bits.mean().item(), "by quarter": bits.mean(0).tolist(), "seconds": seconds}
    of_texts = [round(value, 5) for value in bits.mean(1).tolist()]
    kept = {key: settings[key] for key in ("updates", "learning_rate")}
    file.write_text(
        json.dumps({"row": row, "seed": seed, **kept, **result, "step bytes": step_memory(row), "of texts": of_texts})
    )
    print(f"{row}, seed {seed}: {result}", flush=True)


# ---- the table

COLUMNS = (
    "", "seeds", "bits a character", "over end to end", "by quarter of the masked share, least first", "CPU seconds",
    "layers a step of training or sampling", "memory of a training step",
)  # fmt: skip


def table(results: list[dict]) -> str:
    """Markdown. Of one seed, `±` is the standard error over texts (what a row is over end to end: of paired ones); of several,
    the standard deviation over seeds."""
    end_to_end = {result["seed"]: result for result in results if result["row"] == END_TO_END}
    return "\n".join(table_of(COLUMNS, ROWS, results, lambda row, runs: _cells(row, runs, end_to_end)))


def _cells(row: str, runs: list[dict], end_to_end: dict[int, dict]) -> list[str]:
    bits = [run["bits"] for run in runs]
    spread = statistics.stdev(bits) if len(runs) > 1 else _standard_error(runs[0]["of texts"])
    quarters = torch.tensor([run["by quarter"] for run in runs]).mean(0).tolist()
    return [
        row,
        str(len(runs)),
        f"{statistics.mean(bits):.3f} ± {spread:.3f}",
        "" if row == END_TO_END else _over([run for run in runs if run["seed"] in end_to_end], end_to_end),
        " ".join(f"{quarter:.2f}" for quarter in quarters),
        f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        _layers_a_step(row),
        f"{runs[0]['step bytes'] / 2**20:.0f} MiB",
    ]


def _over(runs: list[dict], end_to_end: dict[int, dict]) -> str:
    if not runs:
        return ""
    if len(runs) > 1:
        over = [100 * (run["bits"] / end_to_end[run["seed"]]["bits"] - 1) for run in runs]
        return f"{statistics.mean(over):+.1f} ± {statistics.stdev(over):.1f} %"
    ours, theirs = runs[0], end_to_end[runs[0]["seed"]]
    differences = torch.tensor(ours["of texts"]) - torch.tensor(theirs["of texts"])
    share = 100 / theirs["bits"]
    return f"{share * differences.mean():+.1f} ± {share * _standard_error(differences.tolist()):.1f} %"


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _layers_a_step(row: str) -> str:
    """Layers that a step runs, from least to most."""
    layers, fields = ROWS[row]
    counts = fields.get("layers_per_block", [layers // fields["num_blocks"]] * fields["num_blocks"])
    return f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])


def main() -> None:
    parser = parser_of(__doc__, ROWS, "train.parquet and validation.parquet", "the cached runs, the models and the table")
    parser.add_argument("--updates", type=int, default=3000, help="updates of every parameter")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--texts", type=int, default=2048, help="of the held-out works, to measure on")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "updates": options.updates, "learning_rate": options.learning_rate, "texts": options.texts,
        "output": str(options.output), "characters": characters(options.data, options.output),
    }  # fmt: skip
    run_and_report(run, ROWS, table, options, settings)


if __name__ == "__main__":
    main()
