"""The paper's ViT trained to the end: accuracy over updates, on digits and on Fashion-MNIST, beside end to end.

    python benchmarks/quality_paper.py --data ../shared/data/fashion_mnist --output outputs/quality_paper --seeds 0 1 2

A ViT of 6 layers, width 64, in 3 blocks; AdamW, 1e-3 with cosine, batches of 64, equal updates of every parameter: 1,500 on
scikit-learn's digits (1,437 images, 67 epochs), 3,140 on Fashion-MNIST (the first 10,000 images, 20 epochs, patches of 7 x 7).
Each model is read on the test images at ten points of its run. Runs are cached in the output folder one by one.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import torch
from cached_runs import parser_of, run_and_report
from quality_images import collate, load_split
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db

LAYERS, BLOCKS, POINTS = 6, 3, 10
#: Task -> size of images, of patches, and updates
TASKS = {"digits": (8, 2, 1_500), "fashion": (28, 7, 3_140)}
#: Way to train -> layers of a plain model, or the preset
WAYS: dict[str, int | str] = {
    "end to end": LAYERS,
    "end to end, one block's depth": LAYERS // BLOCKS,
    "paper": "paper",
    "recommended": "recommended",
}
ROWS = [f"{task}, {way}" for task in TASKS for way in WAYS]


def load_digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The demo's split of scikit-learn's digits: images `[N, 1, 8, 8]` of mean near 0, labels `[N]`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels, order = torch.tensor(digits.target), np.random.default_rng(0).permutation(len(images))
    return {split: (images[rows], labels[rows]) for split, rows in (("train", order[:1437]), ("test", order[1437:]))}


class Curve(TrainerCallback):
    """Reads the model at some steps of its run."""

    def __init__(self, test: TensorDataset):
        self.test, self.points, self.seconds = test, [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % (state.max_steps // POINTS):
            return
        self.seconds += time.process_time() - self._started
        training = model.training
        self.points.append({"share": state.global_step / state.max_steps, **read(model.eval(), self.test)})
        model.train(training)
        self._started = time.process_time()


@torch.no_grad()
def read(model, test: TensorDataset) -> dict[str, float]:
    """Accuracy by each way to read a model; a plain model has logits alone."""
    correct: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    for images, labels in DataLoader(test, batch_size=1000):
        found = {"logits": model(pixel_values=images).logits}
        if isinstance(model, db.DiffusionBlocksPreTrainedModel):
            of_blocks = model.block_logits(images)
            if model.config.preset == "paper":
                found["block 0"] = of_blocks[:, 0]
                for steps in (2, 3):
                    found[f"walk T={steps}"] = model.predict(images, steps, generator=generator).logits
            else:
                found["mean of blocks"] = of_blocks.log_softmax(-1).mean(1)
        for name, logits in found.items():
            correct[name] = correct.get(name, 0) + int((logits.argmax(-1) == labels).sum())
    return {name: 100 * count / len(test) for name, count in correct.items()}


def run(job: tuple) -> None:
    """Train one row with one seed, and write its curve."""
    row, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    task, way = row.split(", ", 1)
    image_size, patch_size, updates = TASKS[task]
    data = torch.load(settings["data"])[task]
    train_set, test_set = (TensorDataset(*data[split]) for split in ("train", "test"))
    set_seed(seed)
    config = ViTConfig(
        num_hidden_layers=WAYS[way] if isinstance(WAYS[way], int) else LAYERS, hidden_size=64, intermediate_size=256,
        num_attention_heads=4, image_size=image_size, patch_size=patch_size, num_channels=1, num_labels=10,
    )  # fmt: skip
    arguments = dict(
        output_dir=settings["output"], per_device_train_batch_size=64, learning_rate=1e-3, weight_decay=0.05,
        lr_scheduler_type="cosine", warmup_steps=0.05, seed=seed, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    curve = Curve(test_set)
    given = {"train_dataset": train_set, "data_collator": collate, "callbacks": [curve]}
    if isinstance(WAYS[way], int):
        args = TrainingArguments(max_steps=updates, **arguments)
        trainer = Trainer(model=ViTForImageClassification(config), args=args, **given)
    else:
        args = db.DiffusionBlocksTrainingArguments(updates_per_block=updates, measure_memory=False, **arguments)
        model = db.convert(config, num_blocks=BLOCKS, preset=WAYS[way])
        trainer = db.DiffusionBlocksTrainer(model=model, args=args, **given)
    trainer.train()
    result = {"row": row, "seed": seed, "updates": updates, "seconds": curve.seconds, "curve": curve.points}
    file.write_text(json.dumps(result))
    print(f"{row}, seed {seed}: {curve.points[-1]}, {curve.seconds:.0f} s", flush=True)


def table(results: list[dict]) -> str:
    """Markdown; accuracies in %, at a tenth, a half and the end of a run; of the end means and standard deviations."""
    lines = []
    for task, (_, _, updates) in TASKS.items():
        at = [updates // 10, updates // 2, updates]
        heads = " | ".join(f"{each:,} updates" for each in at)
        lines += [f"{task}:", "", f"| | read by | seeds | {heads} | CPU seconds |", "|---|---|---|---|---|---|---|"]
        for way in WAYS:
            runs = [result for result in results if result["row"] == f"{task}, {way}"]
            for reading in runs[0]["curve"][-1] if runs else ():
                if reading != "share":
                    points = (0, POINTS // 2 - 1, POINTS - 1)
                    cells = (_cell([each["curve"][point][reading] for each in runs]) for point in points)
                    seconds = statistics.mean(each["seconds"] for each in runs)
                    lines.append(f"| {way} | {reading} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = parser_of(
        __doc__, ROWS, "Fashion-MNIST's train.parquet and test.parquet", "the cached runs, results.json and the table"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "data.pt"
    if not data.is_file():
        fashion = {split: load_split(options.data, split) for split in ("train", "test")}
        fashion["train"] = tuple(each[:10_000] for each in fashion["train"])
        torch.save({"digits": load_digits(), "fashion": fashion}, data)
    settings = {"updates": TASKS["fashion"][2], "output": str(options.output), "data": str(data)}
    run_and_report(run, ROWS, table, options, settings)


if __name__ == "__main__":
    main()
