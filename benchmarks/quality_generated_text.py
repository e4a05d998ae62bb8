"""What generated text is worth: the paper's text denoiser beside end to end, by a judge that is trained here.

    python benchmarks/quality_generated_text.py --data ../shared/data/gutenberg --output outputs/quality_generated_text

Rows of quality_text.py's table (a Llama of 8 layers, width 96, on characters of novels; equal updates of every layer) continue
128 beginnings of 32 characters, of held-out novels, by 96 characters: greedily, sampled at temperature 1, and sampled from the
likeliest 95 %. Measured are the judge's perplexity a character (a wider Llama, trained longer), and, never without that, how
varied the text is; so are the true continuations. Models and runs are cached in the output folder one by one.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from cached_runs import parser_of, run_and_report
from characters import ALPHABET, characters, decode, tokenizer
from gutenberg import config_for
from ladder import ROWS as LADDER
from ladder import Row, new_model, new_trainer
from quality_text import BATCH_SIZE, LENGTH, WIDTH, ChunkedTrainer, Sequences, bits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from hf_diffusionblocks.evaluation.generated_text import generation_measures

JUDGE, JUDGE_WIDTH = Row(None, layers=6), 192
REAL, PAPER = "real text", "B=4, the paper's settings"
TRAINED = (PAPER, "end to end, 8 layers", "end to end, 2 layers", "B=4, own loss, local head of one layer")
#: Row -> way to train; None is the true continuation.
ROWS: dict[str, Row | None] = {REAL: None} | {name: LADDER[name] for name in TRAINED}
TEXTS, PROMPT = 128, 32
#: Name -> what `generate` is given.
SEARCHES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "sampled, top-p 0.95": {"do_sample": True, "top_k": 0, "top_p": 0.95},
}
STEPS = (4, 1)  # of walks: the paper's, and one


def trained(row: Row, width: int, updates: int, seed: int, settings: dict, folder: Path) -> tuple[PreTrainedModel, float]:
    """A row's model and the CPU seconds of its training; read from `folder` if it is there."""
    seconds_file = folder / "seconds.txt"
    if seconds_file.is_file():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), float(seconds_file.read_text())
    set_seed(seed)
    source = config_for("llama", row.layers, width, len(ALPHABET), LENGTH)
    source.eos_token_id = None  # no character ends a text
    model = new_model(row, source)
    rows = Sequences(torch.load(settings["characters"])["train"].long(), LENGTH)
    trainer = new_trainer(
        model, row, rows, updates, ChunkedTrainer, output_dir=settings["output"], per_device_train_batch_size=BATCH_SIZE,
        learning_rate=settings["learning_rate"] * WIDTH / width, weight_decay=0.1, adam_beta2=0.95, seed=seed,
    )  # fmt: skip
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    model.save_pretrained(folder)
    seconds_file.write_text(str(seconds))
    return model.eval(), seconds


def run(job: tuple) -> None:
    name, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    judge, _ = trained(JUDGE, JUDGE_WIDTH, settings["judge_updates"], 100, settings, settings["judge"])
    held_out = torch.load(settings["characters"])["validation"].long()
    rows = Sequences(held_out, LENGTH).tokens
    rows = rows[:: len(rows) // TEXTS][:TEXTS]
    result = {"row": name, "seed": seed, "updates": settings["updates"], "learning_rate": settings["learning_rate"]}
    if name == REAL:
        readings = {REAL: rows[:, PROMPT:]}
        result |= {"judge": bits(judge, Sequences(held_out[: settings["held_out"]], LENGTH))["logits"]}
    else:
        model, seconds = trained(ROWS[name], WIDTH, settings["updates"], seed, settings, file.with_suffix(""))
        found = bits(model, Sequences(held_out[: settings["held_out"]], LENGTH))
        result |= {"seconds": seconds, "bits": found}
        readings = written(model, rows[:, :PROMPT], seed, STEPS if name == PAPER else (None,))
    known = set(decode(torch.load(settings["characters"])["train"]).split())
    prompts = [decode(row) for row in rows[:, :PROMPT]]
    texts = {reading: [decode(row) for row in found] for reading, found in readings.items()}
    result["readings"] = {reading: measured(found, prompts, judge, known) for reading, found in texts.items()}
    result["texts"] = {reading: [prompts[0] + "|" + found[0], prompts[9] + "|" + found[9]] for reading, found in texts.items()}
    file.write_text(json.dumps(result))
    print(json.dumps(result, indent=1), flush=True)


@torch.no_grad()
def written(model: PreTrainedModel, prompts: torch.Tensor, seed: int, steps: tuple) -> dict[str, torch.Tensor]:
    """By each way to search, and number of steps: what follows the prompts `[N, S]`."""
    # (With a mask: `generate` would take spaces, which are token 0, for padding.)
    given = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": LENGTH - PROMPT, "pad_token_id": 0}
    found = {}
    for count in steps:
        for search, arguments in SEARCHES.items():
            set_seed(seed)
            of_walk = {} if count is None else {"num_steps": count}
            tokens = model.generate(prompts, **given, **arguments, **of_walk)
            found[search if count is None else f"{search}, T={count}"] = tokens[:, PROMPT:]
    return found


def measured(texts: list[str], prompts: list[str], judge: PreTrainedModel, known: set[str]) -> dict[str, float]:
    """By characters: perplexity, entropy, repeated 4-grams. By whole words: how many differ, and how many novels have."""
    found = generation_measures(texts, tokenizer(), judge, prompts, batch_size=64)
    whole = [text.split(" ")[1:-1] for text in texts]
    words = [word for text in whole for word in text]
    of_words = generation_measures([" ".join(text) for text in whole], _of_words(set(words)))
    return {
        **{name: found[name] for name in ("generative_perplexity", "entropy", "repetition_rate")},
        **{f"{name} of words": of_words[name] for name in ("distinct_1", "distinct_2", "distinct_3", "entropy")},
        "known words": sum(word in known for word in words) / len(words),
    }


def _of_words(words: set[str]) -> PreTrainedTokenizerFast:
    of_words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(sorted(words))}))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=of_words)


# ---- the table

MEASURES = {
    "generative_perplexity": "judge's perplexity a character", "repetition_rate": "repeated 4-grams",
    "distinct_1 of words": "distinct words", "distinct_2 of words": "distinct pairs of words",
    "entropy of words": "entropy of words, nats", "known words": "words that novels have",
}  # fmt: skip


def table(results: list[dict]) -> str:
    """Markdown; means and standard deviations over seeds."""
    lines = [f"|  | written | seeds | {' | '.join(MEASURES.values())} |", "|---" * (3 + len(MEASURES)) + "|"]
    for name in ROWS:
        runs = [result for result in results if result["row"] == name]
        for reading in runs[0]["readings"] if runs else ():
            cells = (_cell([each["readings"][reading][measure] for each in runs]) for measure in MEASURES)
            lines.append(f"| {name} | {reading} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = parser_of(__doc__, ROWS, "train.parquet and validation.parquet", "the cached runs, the models and the table")
    parser.add_argument("--updates", type=int, default=800, help="updates of every layer")
    parser.add_argument("--judge_updates", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="at width 96; in inverse proportion to the width")
    parser.add_argument("--held_out", type=int, default=32768, help="characters to measure bits on")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("updates", "judge_updates", "learning_rate", "held_out")}
    settings |= {"output": str(options.output), "characters": str(characters(options.data, options.output))}
    settings["judge"] = options.output / f"judge-updates{options.judge_updates}"
    trained(JUDGE, JUDGE_WIDTH, options.judge_updates, 100, settings, settings["judge"])  # once, before runs share it
    run_and_report(run, ROWS, table, options, settings)


if __name__ == "__main__":
    main()
