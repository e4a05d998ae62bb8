"""Text into classes: who wrote these 128 tokens? Plain models of six layers and of two, to see what depth is worth; and blocks,
the recommended and, of the Llama, the paper's.

    python benchmarks/quality_text_classes.py --data ../shared/data/gutenberg --output outputs/quality_text_classes

Twenty authors of novels; a byte-level BPE; width 64, from scratch: a ModernBERT that averages its tokens, and a Llama that is
read at its last one. Accuracy on the last tenth of each work that was trained on, and on a work of each author of which nothing
was: by `logits`, which of the paper's are the end of a walk of three steps, and of these by the first block alone, too. Runs are
cached in the output folder one by one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cached_runs import parser_of, run_and_report
from datasets import load_dataset
from gutenberg import byte_pairs
from ladder import Row, new_model, new_trainer
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, LlamaConfig, ModernBertConfig, PreTrainedConfig, set_seed
from transformers.utils import logging

AUTHORS, VOCAB, LENGTH, WIDTH, LAYERS, BATCH_SIZE = 20, 1000, 128, 64, 6, 32
#: Characters: at most so many of a work, and at least so many of the one kept for the test; rows an author, at most.
WORK, KEPT, TRAIN_ROWS, TEST_ROWS = 400_000, 130_000, 3000, 150
BLOCKS = {"task": "text-classification", "num_blocks": 3}
KINDS: dict[str, Row] = {
    "end to end, 6 layers": Row(None, layers=LAYERS),
    "end to end, 2 layers": Row(None, layers=2),
    "recommended, B=3": Row(BLOCKS, layers=LAYERS),
    "paper, B=3": Row({**BLOCKS, "preset": "paper"}, layers=LAYERS),
}
#: Model -> its learning rate. (At 2e-3 the Llama of six layers has 21 %, that of two 38 %.)
RATES = {"ModernBERT": 2e-3, "Llama": 5e-4}
ROWS = {
    f"{model}, {kind}": row for model in RATES for kind, row in KINDS.items() if (model, kind) != ("ModernBERT", "paper, B=3")
}
SPLITS = {"parts": "unseen parts of known works", "works": "unseen works"}


def prepare(folder: Path, output: Path) -> Path:
    """A file of "train", "parts" and "works": tokens `[N, S]` and the numbers of their authors `[N]`."""
    file = output / f"authors-{AUTHORS}-{VOCAB}.pt"
    if not file.is_file():
        data = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train").to_pandas()
        names = sorted(data["author"].unique())[:AUTHORS]
        texts = [_texts_of(data[data["author"] == name]) for name in names]
        tokenizer = byte_pairs((text[:100_000] for author in texts for text in author["train"]), VOCAB)
        limits = {"train": TRAIN_ROWS, "parts": TEST_ROWS, "works": TEST_ROWS}
        torch.save({split: _rows_of(texts, split, tokenizer, limit) for split, limit in limits.items()}, file)
    return file


def _texts_of(of_author) -> dict[str, list[str]]:
    """Split -> texts of one author."""
    works = sorted(of_author.groupby("title")["text"].agg("\n".join), key=len)
    kept = next(number for number, work in enumerate(works) if len(work) >= KEPT)
    others = [work[:WORK] for number, work in enumerate(works) if number != kept]
    ends = [len(work) * 9 // 10 for work in others]
    return {
        "train": [work[:end] for work, end in zip(others, ends)],
        "parts": [work[end:] for work, end in zip(others, ends)],
        "works": [works[kept][:WORK]],
    }


def _rows_of(texts: list[dict], split: str, tokenizer: Tokenizer, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As many of each author, if he has as many, from all over his texts."""
    rows, labels = [], []
    for label, author in enumerate(texts):
        tokens = torch.tensor([token for text in tokenizer.encode_batch(author[split]) for token in text.ids])
        cut = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        chosen = torch.randperm(len(cut), generator=torch.Generator().manual_seed(label))[:limit]
        rows.append(cut[chosen])
        labels.append(torch.full((len(chosen),), label))
    return torch.cat(rows), torch.cat(labels)


def plain_config(model: str, layers: int) -> PreTrainedConfig:
    sizes = dict(
        num_hidden_layers=layers, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=2, vocab_size=VOCAB,
        max_position_embeddings=LENGTH, num_labels=AUTHORS,
    )  # fmt: skip
    if model == "Llama":
        return LlamaConfig(**sizes, pad_token_id=VOCAB - 1)
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertConfig(**sizes, classifier_pooling="mean", **ends)


def run(job: tuple) -> None:
    name, seed, settings, file = job
    row, model_name = ROWS[name], name.partition(",")[0]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = torch.load(settings["data"])
    set_seed(seed)
    model = new_model(row, plain_config(model_name, row.layers), AutoModelForSequenceClassification)
    trainer = new_trainer(
        model, row, [{"input_ids": tokens, "labels": label} for tokens, label in zip(*data["train"])], settings["updates"],
        output_dir=settings["output"], per_device_train_batch_size=BATCH_SIZE, learning_rate=RATES[model_name],
        weight_decay=0.01, seed=seed,
    )  # fmt: skip
    start = time.process_time()
    trainer.train()
    result = {"row": name, "seed": seed, "updates": settings["updates"], "learning rate": RATES[model_name]}
    result["seconds"] = time.process_time() - start
    model.eval()
    for split in SPLITS:
        result |= read(lambda some: model(input_ids=some).logits, split, *data[split])
        if row.fields and row.fields.get("preset") == "paper":
            result |= read(lambda some: model.block_logits(some)[:, 0], f"{split}, block 0", *data[split])
    file.write_text(json.dumps(result))
    print(json.dumps(result), flush=True)


@torch.no_grad()
def read(gives_logits: Callable, split: str, rows: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy in %, and nats, which tell smaller differences, of what gives logits."""
    logits = torch.cat([gives_logits(some) for some in rows.split(50)])
    accuracy = 100 * (logits.argmax(-1) == labels).float().mean().item()
    return {split: accuracy, f"{split}, nats": F.cross_entropy(logits, labels).item()}


def table(results: list[dict]) -> str:
    """Markdown; means and standard deviations over seeds."""
    measures, digits = {}, {"seconds": 0}
    for split, name in SPLITS.items():
        measures |= {split: f"{name}, %", f"{split}, nats": f"{name}, nats"}
        digits[f"{split}, nats"] = 3
    measures["seconds"] = "CPU seconds"
    lines = [f"|  | seeds | {' | '.join(measures.values())} |", "|---" * (2 + len(measures)) + "|"]
    for name in ROWS:
        if runs := [result for result in results if result["row"] == name]:
            cells = (_cell([each[measure] for each in runs], digits.get(measure, 1)) for measure in measures)
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = parser_of(__doc__, ROWS, "Gutenberg's train.parquet")
    parser.add_argument("--updates", type=int, default=2000, help="updates of every layer")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {"updates": options.updates, "output": str(options.output), "data": str(prepare(options.data, options.output))}
    run_and_report(run, ROWS, table, options, settings)


if __name__ == "__main__":
    main()
