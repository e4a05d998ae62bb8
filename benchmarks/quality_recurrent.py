"""Recurrent depth: DiffusionBlocks beside end-to-end training, on characters of novels.

    python benchmarks/quality_recurrent.py --data ../shared/data/gutenberg --output outputs/quality_recurrent
    python benchmarks/quality_recurrent.py ... --picture docs/recurrent_depth.png  # draws what the folder has, too

27 symbols; a prelude, a core and a coda of 2 layers each, width 96; equal updates of every parameter, 16 x 128 characters
each. All rows are measured on the same held-out texts in bits a character, at K = 1, 2, 4 and 8 runs of the core (steps of
the walk). A walk ends next to a point mass, so a model of blocks is scored by its walk's probabilities *averaged over many
noises*; `one noise` is what the end of a single walk would score. The average of n walks of K > 1 is a histogram, which costs
some bits at any n: so K = 1 is given as a histogram, too (a token drawn from each), and the table has half the walks beside.
The bound is that of the diffusion itself (`nll_bound`). Runs are cached in the output folder one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from cached_runs import add_run_options, report, results_of
from characters import ALPHABET, characters
from quality_text import ChunkedTrainer, Sequences
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, TrainingArguments, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.models.causal_lm.task import plain_loss
from hf_diffusionblocks.tasks import backbone_for

BATCH, LENGTH, WIDTH = 16, 128, 96
PRELUDE = CORE = CODA = 2
RUNS = (1, 2, 4, 8)
END_TO_END, PLAIN = "end to end", "plain Llama of 6 layers"
#: Row -> what `convert` is given; None: the plain model.
ROWS: dict[str, dict | None] = {
    END_TO_END: None,
    "blocks (paper)": {},
    PLAIN: None,
}


def new_model(row: str, settings: dict):
    shape = dict(
        hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_attention_heads=WIDTH // 32, vocab_size=len(ALPHABET),
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if row == PLAIN:
        return AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=PRELUDE + CORE + CODA, **shape))
    config = AutoConfig.for_model(
        "recurrent_depth_llama", num_prelude_layers=PRELUDE, num_core_layers=CORE, num_coda_layers=CODA,
        mean_recurrence=settings["mean_recurrence"], **shape,
    )  # fmt: skip
    if ROWS[row] is None:
        return AutoModelForCausalLM.from_config(config)
    return db.convert(config, preset="paper", **ROWS[row])


def train(model, train_set, seed: int, settings: dict) -> None:
    arguments = dict(
        output_dir=settings["output"], per_device_train_batch_size=BATCH, weight_decay=0.1, adam_beta2=0.95,
        learning_rate=settings["learning_rate"], lr_scheduler_type="cosine", warmup_steps=0.05, seed=seed, use_cpu=True,
        max_steps=settings["updates"], report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    if isinstance(model, db.DiffusionBlocksForCausalLM):
        args = db.DiffusionBlocksTrainingArguments(measure_memory=False, **arguments)
        db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=train_set).train()
    else:
        ChunkedTrainer(model=model, args=TrainingArguments(**arguments), train_dataset=train_set).train()


# ---- reading


@torch.no_grad()
def plain_bits(model, tokens: torch.Tensor) -> dict[str, list[float]]:
    """K -> mean bits a character of each text; a model without a core to run has the same at every K."""
    found = {}
    for runs in RUNS:
        given = {"num_steps": runs} if hasattr(model.config, "mean_recurrence") else {}
        logits = model(tokens, use_cache=False, **given).logits[:, :-1]
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        found[str(runs)] = (nats.view(len(tokens), -1).mean(1) / math.log(2)).tolist()
    return found


@torch.no_grad()
def walked_bits(model, tokens: torch.Tensor, walks: int) -> dict[str, dict[str, list[float]]]:
    """Reading -> K -> mean bits a character of each text. Readings: probabilities averaged over all walks, over half of
    them, those of one, and a histogram of tokens drawn from each."""
    found: dict[str, dict[str, list[float]]] = {}
    draws = torch.Generator().manual_seed(0)
    for runs in RUNS:
        total, drawn = torch.zeros(*tokens.shape, len(ALPHABET)), torch.zeros(*tokens.shape, len(ALPHABET))
        for seed in range(walks):
            model.config.inference_seed = seed
            probabilities = model(tokens, use_cache=False, num_steps=runs).logits.softmax(-1)
            if seed == 0:
                found.setdefault("one noise", {})[str(runs)] = bits_of(probabilities, tokens, 1)
            token = torch.multinomial(probabilities.flatten(0, 1), 1, generator=draws).view(tokens.shape)
            total += probabilities
            drawn += F.one_hot(token, len(ALPHABET))
            if seed + 1 == walks // 2:
                found.setdefault("half the walks", {})[str(runs)] = bits_of(total, tokens, walks // 2)
        found.setdefault("all walks", {})[str(runs)] = bits_of(total, tokens, walks)
        found.setdefault("histogram", {})[str(runs)] = bits_of(drawn, tokens, walks)
    model.config.inference_seed = 0
    return found


def bits_of(total: torch.Tensor, tokens: torch.Tensor, walks: int) -> list[float]:
    """Of each text, mean bits a character of `total [N, S, V]`, probabilities summed over walks. Where there are several, one
    more that ends in all symbols alike keeps one that no walk ended in from costing infinity."""
    of_target = total[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].double()
    if walks > 1:
        of_target, walks = of_target + 1 / total.shape[-1], walks + 1
    return (-(of_target / walks).clamp(min=1e-300).log2()).mean(1).tolist()


def bound_bits(model, tokens: torch.Tensor) -> list[float]:
    """The diffusion's own bound in bits a character, and its standard error."""
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(16)]
    bound = db.nll_bound(model, batches, num_samples=16)
    return [bound.nats_per_token / math.log(2), bound.standard_error / math.log(2)]


# ---- what a step costs


def step_bytes(row: str, settings: dict) -> int:
    """Peak bytes of a training step, by the ledger."""
    model, tokens = new_model(row, settings).train(), torch.randint(len(ALPHABET), (BATCH, LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if isinstance(model, db.DiffusionBlocksForCausalLM):
        return db.measure_memory(model, optimizer, lambda: model(tokens, labels=tokens, block_index=0).loss).total
    largest = backbone_for(model.config).largest_step(model.config)
    return db.measure_memory(model, optimizer, lambda: plain_loss(model, labels=tokens, input_ids=tokens, **largest)).total


def layers_an_update(row: str, settings: dict) -> tuple[float, float]:
    """How often a layer runs over all tokens of an update, on average: forward, and with a gradient."""
    if row == PLAIN:
        return PRELUDE + CORE + CODA, PRELUDE + CORE + CODA
    if ROWS[row] is not None:  # clean tokens, then noisy ones; (of the last layer, clean ones need keys and values only)
        return PRELUDE + 2 * (CORE + CODA), PRELUDE + 2 * (CORE + CODA)
    config = new_model(row, settings).config
    return PRELUDE + (config.mean_recurrence + 1) * CORE + CODA, PRELUDE + config.num_backprop_steps * CORE + CODA


def run(job: tuple) -> None:
    row, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = {split: tokens.long() for split, tokens in torch.load(settings["characters"]).items()}
    set_seed(seed)
    model, start = new_model(row, settings), time.process_time()
    train(model, Sequences(data["train"], LENGTH), seed, settings)
    seconds = time.process_time() - start
    model.eval().save_pretrained(file.with_suffix(""))
    held_out = Sequences(data["validation"], LENGTH).tokens
    tokens = held_out[:: len(held_out) // settings["texts"]][: settings["texts"]]
    if isinstance(model, db.DiffusionBlocksForCausalLM):
        more = held_out[1 :: len(held_out) // settings["bound_texts"]][: settings["bound_texts"]]
        readings = {"bits": walked_bits(model, tokens, settings["walks"]), "bound": bound_bits(model, more)}
    else:
        readings = {"bits": {"logits": plain_bits(model, tokens)}}
    forward, backward = layers_an_update(row, settings)
    result = {
        "row": row, "seed": seed, "seconds": seconds, "step bytes": step_bytes(row, settings), "layers forward": forward,
        "layers with gradient": backward, **readings,
        **{key: settings[key] for key in ("updates", "learning_rate", "mean_recurrence", "walks", "texts")},
    }  # fmt: skip
    file.write_text(json.dumps(result))
    print(f"{row}, seed {seed}: {seconds:.0f} s, " + ", ".join(cells(result)), flush=True)


# ---- the table and the picture


def mean_of(result: dict, reading: str, runs: int) -> float:
    return torch.tensor(result["bits"][reading][str(runs)]).mean().item()


def cells(result: dict) -> list[str]:
    """A row of the table, without its name."""
    readings = {"logits": result["bits"]["logits"]} if "logits" in result["bits"] else result["bits"]
    shown = ["logits"] if "logits" in readings else ["all walks", "half the walks", "histogram", "one noise"]
    by_reading = ["; ".join(f"{mean_of(result, reading, runs):.3f}" for reading in shown) for runs in RUNS]
    bound = "{:.3f} ± {:.3f}".format(*result["bound"]) if "bound" in result else ""
    return [
        *by_reading, bound, f"{result['seconds']:.0f}", f"{result['step bytes'] / 2**20:.1f} MiB",
        f"{result['layers forward']:g}, {result['layers with gradient']:g}",
    ]  # fmt: skip


def summary(result: dict) -> dict:
    """A result with means over texts for its texts: `reading -> K -> [mean, standard error]`."""
    bits = {
        reading: {runs: _mean_and_error(of_texts) for runs, of_texts in by_runs.items()}
        for reading, by_runs in result["bits"].items()
    }
    return {**result, "bits": bits}


def _mean_and_error(of_texts: list[float]) -> list[float]:
    return [round(statistics.mean(of_texts), 4), round(statistics.stdev(of_texts) / math.sqrt(len(of_texts)), 4)]


def table(results: list[dict]) -> str:
    """Markdown; of blocks a cell has, in this order: all walks; half of them; the histogram; one noise."""
    heads = [
        "",
        "seed",
        *(f"K = {runs}" for runs in RUNS),
        "bound",
        "CPU seconds",
        "memory of a step",
        "layers an update, with gradient",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in ROWS:
        lines += [f"| {row} | {result['seed']} | {' | '.join(cells(result))} |" for result in results if result["row"] == row]
    return "\n".join(lines)


def draw(results: list[dict], file: Path) -> None:
    """Bits a character against K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for row, color in zip(ROWS, plt.get_cmap("tab10").colors):
        for result in (result for result in results if result["row"] == row):
            reading = "logits" if "logits" in result["bits"] else "all walks"
            points = [mean_of(result, reading, runs) for runs in RUNS]
            axes.plot(RUNS, points, "--" if row == PLAIN else "o-", color=color, label=row)
            if reading == "all walks":
                drawn = [mean_of(result, "histogram", runs) for runs in RUNS]
                axes.plot(RUNS, drawn, ":", color=color, label=f"{row}, as a histogram of {result['walks']} walks")
    axes.set_xscale("log", base=2)
    axes.set_xticks(RUNS, [str(runs) for runs in RUNS])
    axes.set_xlabel("K, runs of the core for a token")
    axes.set_ylabel("bits a character, held out")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cached runs, the models and the table")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--mean_recurrence", type=int, default=8)
    parser.add_argument("--texts", type=int, default=32, help="of the held-out works, to walk on")
    parser.add_argument("--walks", type=int, default=128, help="noises a token")
    parser.add_argument("--bound_texts", type=int, default=256, help="of the held-out works, for the bound")
    parser.add_argument("--picture", type=Path, help="where to draw bits against K")
    add_run_options(parser, ROWS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    names = ("updates", "learning_rate", "mean_recurrence", "texts", "walks", "bound_texts")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"output": str(options.output), "characters": characters(options.data, options.output)}
    results = results_of(run, ROWS, options.rows, options.seeds, settings, options.output, options.processes)
    report([summary(result) for result in results], table(results), options.updates, options.output)
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
