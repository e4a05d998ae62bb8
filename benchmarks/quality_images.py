"""Image classification quality: DiffusionBlocks beside end-to-end training, on Fashion-MNIST.

    python benchmarks/quality_images.py --data ../shared/data/fashion_mnist --output outputs/quality_images --seeds 0 1 2

One table: end to end, one block's depth, the paper's formulation and the recommended one, of a ViT; and of a ConvNeXt, whose
stages are its blocks, and of which depth is worth more. Equal updates per parameter, mean and standard deviation over seeds,
every model read by each of its predictors. Runs are cached in the output folder one by one, so an interrupted benchmark goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from cached_runs import add_run_options, results_of, table_of
from datasets import load_dataset
from transformers import (
    AutoModelForImageClassification, ConvNextConfig, PreTrainedConfig, Trainer, TrainingArguments, ViTConfig, set_seed,
)  # fmt: skip
from transformers.utils import logging

import hf_diffusionblocks as db

LAYERS, BLOCKS = 6, 3
WIDTHS = [32, 64, 128, 256]  #: of the ConvNeXt's stages, of two layers each


def vit(layers: int = LAYERS) -> ViTConfig:
    return ViTConfig(
        num_hidden_layers=layers, hidden_size=64, intermediate_size=256, num_attention_heads=4, image_size=28,
        patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip


def convnext(stages: int = len(WIDTHS)) -> ConvNextConfig:
    return ConvNextConfig(
        num_channels=1, patch_size=2, num_stages=stages, hidden_sizes=WIDTHS[:stages], depths=[2] * stages, image_size=28,
        num_labels=10,
    )  # fmt: skip


#: Row -> the plain model, and what `convert` is given; None: it trains end to end. "together": all blocks in every step.
ROWS: dict[str, tuple[PreTrainedConfig, dict | None]] = {
    "end to end": (vit(), None),
    "end to end, one block's depth": (vit(LAYERS // BLOCKS), None),
    "paper, B=1": (vit(), {"preset": "paper", "num_blocks": 1}),
    "paper": (vit(), {"preset": "paper"}),
    "recommended": (vit(), {}),
    "recommended, together": (vit(), {"together": True}),
    "recommended, local head of one layer": (vit(), {"local_head_layers": 1}),
    **{
        f"ConvNeXt, end to end, {stages} stage{'s' if stages > 1 else ''}": (convnext(stages), None)
        for stages in range(len(WIDTHS), 0, -1)
    },
    **{f"ConvNeXt, recommended, B={blocks}": (convnext(), {"num_blocks": blocks}) for blocks in (2, 4)},
    "ConvNeXt, recommended, B=4, together": (convnext(), {"num_blocks": 4, "together": True}),
}
READINGS = ("logits", "last block", "mean of blocks", "walk T=3", "walk T=6")


def load_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 1, 28, 28]` float32 of mean 0 and deviation 1, labels `[N]`."""
    data = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    images = torch.tensor(np.stack([np.asarray(image) for image in data["image"]]))
    return ((images.float() / 255 - 0.286) / 0.353)[:, None], torch.tensor(data["label"])


def collate(rows: list) -> dict[str, torch.Tensor]:
    images, labels = zip(*rows)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def train_and_read(row: str, seed: int, settings: dict) -> dict[str, float]:
    """Train one row with one seed and read it in every way it can be read: accuracies, and seconds of training."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = torch.load(settings["data"])
    train_set, test_set = (torch.utils.data.TensorDataset(*data[split]) for split in ("train", "test"))
    config, fields = ROWS[row]
    set_seed(seed)
    shared_args = dict(
        output_dir=settings["output"], per_device_train_batch_size=64, learning_rate=1e-3, weight_decay=0.05,
        lr_scheduler_type="cosine", warmup_steps=0.05, seed=seed, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    if fields is None:
        model = AutoModelForImageClassification.from_config(config)
        args = TrainingArguments(max_steps=settings["updates"], **shared_args)
        trainer = Trainer(model=model, args=args, train_dataset=train_set, data_collator=collate)
    else:
        fields = {"num_blocks": BLOCKS, **fields}
        schedule = "together" if fields.pop("together", False) else "random"
        model = db.convert(config, **fields)
        args = db.DiffusionBlocksTrainingArguments(
            updates_per_block=settings["updates"], block_schedule=schedule, **shared_args
        )
        trainer = db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=train_set, data_collator=collate)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    return {**read(model.eval(), test_set), "seconds": seconds}


@torch.no_grad()
def read(model, test_set) -> dict[str, float]:
    """Accuracy by each reading; a plain model has logits only."""
    correct: dict[str, int] = dict.fromkeys(READINGS, 0)
    generator = torch.Generator().manual_seed(0)
    for images, labels in torch.utils.data.DataLoader(test_set, batch_size=500):
        predictions = {"logits": model(pixel_values=images).logits}
        if isinstance(model, db.DiffusionBlocksPreTrainedModel):
            priors = model.block_logits(images).log_softmax(-1)
            predictions["last block"], predictions["mean of blocks"] = priors[:, -1], priors.mean(1)
            for steps in (3, 6) if model.config.preset == "paper" else ():
                predictions[f"walk T={steps}"] = model.predict(images, steps, generator=generator).logits
        for reading, logits in predictions.items():
            correct[reading] += int((logits.argmax(-1) == labels).sum())
    return {reading: correct[reading] / len(test_set) for reading in predictions}


def run(job: tuple) -> None:
    row, seed, settings, file = job
    result = train_and_read(row, seed, settings)
    file.write_text(json.dumps({"row": row, "seed": seed, "updates": settings["updates"], **result}))
    print(f"{row}, seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()), flush=True)


def table(results: list[dict], updates: int) -> str:
    """Markdown; accuracies in %, mean +- standard deviation over seeds."""
    lines = [
        f"Test accuracy in %, {updates} updates of 64 images for every parameter; ViT {LAYERS} layers, width 64, "
        f"patch 4, B={BLOCKS}; ConvNeXt {len(WIDTHS)} stages of two layers, widths {', '.join(map(str, WIDTHS))}.",
        "",
    ]
    return "\n".join(lines + table_of(("", "seeds", *READINGS), ROWS, results, _cells))


def _cells(row: str, runs: list[dict]) -> list[str]:
    read = (_cell([100 * run[reading] for run in runs if reading in run]) for reading in READINGS)
    return [row, str(len(runs)), *read]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cached runs and the table")
    parser.add_argument("--updates", type=int, default=938, help="updates of every parameter (938: one epoch)")
    add_run_options(parser, ROWS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "data.pt"
    if not data.is_file():
        torch.save({split: load_split(options.data, split) for split in ("train", "test")}, data)
    settings = {"updates": options.updates, "output": str(options.output), "data": str(data)}
    results = results_of(run, ROWS, options.rows, options.seeds, settings, options.output, options.processes)
    result = table(results, options.updates)
    (options.output / "table.md").write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
