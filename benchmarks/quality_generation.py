"""Image generation quality: DiffusionBlocks beside end-to-end training, on Fashion-MNIST.

    python benchmarks/quality_generation.py --data ../shared/data/fashion_mnist --output outputs/quality_generation

A DiT of 6 layers, patch 4, width 96, with EDM's loss and averaged weights; equal updates of every parameter. Each row is
trained once a seed and measured by its held-out denoising loss in each quarter of the noise distribution, by a Frechet
distance in the features of a small classifier that is trained here (it is not the FID of others), by precision and
recall, and by what a step of training holds. Runs are cached in the output folder one by one, so an interrupted
benchmark goes on where it stopped. `--seconds` measures seconds instead, of sampling and of an update of everything, row
beside row: for an idle machine, before the table is made.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from cached_runs import add_run_options, report, results_of, table_of
from copied_blocks import copy_to_every_block
from generation_metrics import (
    frechet_distance, held_out_losses, in_batches, precision_and_recall, trained_classifier,
)  # fmt: skip
from quality_images import load_split
from transformers import set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig

BATCH, STEPS, SIGMA_DATA = 64, 30, 0.7
#: Row -> layers in all, and what `convert` is given.
ROWS: dict[str, tuple[int, dict]] = {
    "end to end, 6 layers": (6, {"num_blocks": 1}),
    "end to end, 2 layers": (2, {"num_blocks": 1}),
    "B=3 of 2 layers": (6, {"num_blocks": 3}),
    "B=3 of 6 layers": (18, {"num_blocks": 3}),
    "B=2 of 3 layers": (6, {"num_blocks": 2}),
    "B=6 of 1 layer": (6, {"num_blocks": 6}),
    "B=3 of 2 layers, own ends": (6, {"num_blocks": 3, "shared": "per_block"}),
    "B=3 of 2 layers, no overlap": (6, {"num_blocks": 3, "overlap": 0.0}),
    "B=3 of 2 layers, overlap 0.2": (6, {"num_blocks": 3, "overlap": 0.2}),
    "B=3 of 1, 2, 3 layers": (6, {"num_blocks": 3, "layers_per_block": [1, 2, 3]}),
    "B=3 of 2 layers, from one of 2 layers": (6, {"num_blocks": 3}),
    "B=3 of 6 layers, from one of 6 layers": (18, {"num_blocks": 3}),
    "B=2 of 3 layers, own ends": (6, {"num_blocks": 2, "shared": "per_block"}),
    "B=3 of 6 layers, own ends": (18, {"num_blocks": 3, "shared": "per_block"}),
}
#: Of a row that starts so: half of its updates train one block's depth on all noise, which then all blocks start from.
FROM_ONE = ", from one of "


def plain_config(layers: int) -> DiTConfig:
    return DiTConfig(
        num_layers=layers, num_attention_heads=4, attention_head_dim=24, in_channels=1, sample_size=28, patch_size=4,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def load_data(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Split -> images `[N, 1, 28, 28]` in [-1, 1], labels `[N]`."""
    data = {split: load_split(folder, split) for split in ("train", "test")}
    return {split: ((images * 0.353 + 0.286) * 2 - 1, labels) for split, (images, labels) in data.items()}


def collate(rows: list) -> dict[str, torch.Tensor]:
    images, labels = zip(*rows)
    return {"pixel_values": torch.stack(images), "class_labels": torch.stack(labels)}


def train(model, updates: int, seed: int, train_set, output: str) -> None:
    """To its averaged weights."""
    args = db.DiffusionBlocksTrainingArguments(
        output, updates_per_block=updates, per_device_train_batch_size=BATCH, learning_rate=4e-3, weight_decay=0.01,
        lr_scheduler_type="constant_with_warmup", warmup_steps=100, ema_decay=0.999, seed=seed, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, measure_memory=False,
    )  # fmt: skip
    trainer = db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=train_set, data_collator=collate)
    trainer.train()
    with trainer.averaged_weights():
        averages = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(averages)


def trained_model(row: str, updates: int, seed: int, train_set, output: str):
    layers, fields = ROWS[row]
    set_seed(seed)
    model = db.convert(plain_config(layers), preset="paper", sigma_data=SIGMA_DATA, **fields)
    if FROM_ONE in row:
        depth = layers // fields["num_blocks"]
        one = db.convert(plain_config(depth), num_blocks=1, preset="paper", sigma_data=SIGMA_DATA)
        train(one, updates // 2, seed, train_set, output)
        copy_to_every_block(one, model, depth)
        updates -= updates // 2
    train(model, updates, seed, train_set, output)
    return model.eval()


def steps_of(row: str) -> list[tuple]:
    """A training step of each block: model, optimizer of what it trains, what makes it train that, and its loss."""
    layers, fields = ROWS[row]
    model = db.convert(plain_config(layers), preset="paper", sigma_data=SIGMA_DATA, **fields).train()
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    steps = []
    for block in model.blocks:
        own = [*model.block_parameters(block.index), *model.shared_parameters()]

        def activate(own=own) -> None:
            model.requires_grad_(False)
            for parameter in own:
                parameter.requires_grad_(True)

        def loss(k=block.index) -> torch.Tensor:
            return model(images, labels, block_index=k).loss

        steps.append((model, torch.optim.AdamW(own, fused=True), activate, loss))
    return steps


def step_memory(row: str) -> int:
    """Peak bytes of a training step of the block that holds most, by the ledger."""
    peaks = []
    for model, optimizer, activate, loss in steps_of(row):
        activate()
        peaks.append(db.measure_memory(model, optimizer, loss).total)
    return max(peaks)


@torch.no_grad()
def measured(model, data: dict, classifier, num_samples: int) -> dict[str, float]:
    images, labels = data["test"]
    losses = held_out_losses(model.denoise, images[:5000], labels[:5000], SIGMA_DATA)
    features_of = lambda images: in_batches(classifier.features, images).double().numpy()  # noqa: E731
    real = features_of(images)
    classes = torch.arange(num_samples) % 10
    result = {"loss": statistics.mean(losses), **{f"loss {q}": loss for q, loss in enumerate(losses)}}
    for grid in ("equal", "karras"):
        parts = []
        for number, part in enumerate(classes.split(250)):
            noise = torch.Generator().manual_seed(number)
            parts.append(model.predict(part, num_inference_steps=STEPS, grid=grid, generator=noise).images)
        made = torch.cat(parts).clamp(-1, 1)
        features = features_of(made)
        precision, recall = precision_and_recall(features, real[:num_samples])
        asked = (in_batches(classifier, made).argmax(1) == classes).float().mean().item()
        result |= {f"frechet {grid}": frechet_distance(features, real), f"precision {grid}": precision}
        result |= {f"recall {grid}": recall, f"class {grid}": asked}
    return result


def run(job: tuple) -> None:
    row, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = torch.load(settings["data"])
    classifier = trained_classifier(data, Path(settings["classifier"]))
    train_set = torch.utils.data.TensorDataset(*data["train"])
    model = trained_model(row, settings["updates"], seed, train_set, settings["output"])
    result = measured(model, data, classifier, settings["samples"])
    model.save_pretrained(file.with_suffix(""))
    numbers = {"updates": settings["updates"], "samples": settings["samples"], **result}
    file.write_text(json.dumps({"row": row, "seed": seed, **numbers, "step bytes": step_memory(row)}))
    print(f"{row}, seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()), flush=True)


# ---- the table


def table(results: list[dict], seconds: dict, floor: float) -> str:
    """Markdown; mean and standard deviation over seeds."""
    updates, samples = results[0]["updates"], results[0]["samples"]
    lines = [
        f"Fashion-MNIST, {updates} updates of {BATCH} images for every parameter; {samples} samples of {STEPS} Euler steps. "
        f"The Frechet distance of as many training images is {floor:.1f}.",
        "",
    ]
    return "\n".join(lines + table_of(COLUMNS, ROWS, results, lambda row, runs: _cells(row, runs, seconds.get(row, {}))))


COLUMNS = (
    "", "seeds", "held-out loss", "by quarter of the noise, lowest first", "Frechet, equal grid", "Karras grid",
    "precision, recall", "asked class", "layers a sampling step", "memory of a training step",
    "seconds: 64 samples, an update of everything",
)  # fmt: skip


def _cells(row: str, runs: list[dict], seconds: dict[str, float]) -> list[str]:
    def of(key: str) -> list[float]:
        return [run[key] for run in runs]

    best = min(("equal", "karras"), key=lambda grid: statistics.mean(of(f"frechet {grid}")))
    return [
        row,
        str(len(runs)),
        _cell(of("loss"), 4),
        " ".join(_cell(of(f"loss {quarter}"), 3, spread=False) for quarter in range(4)),
        _cell(of("frechet equal"), 0),
        _cell(of("frechet karras"), 0),
        ", ".join(_cell(of(f"{measure} {best}"), 2, spread=False) for measure in ("precision", "recall")),
        f"{100 * statistics.mean(of(f'class {best}')):.0f} %",
        _layers_a_step(*ROWS[row]),
        f"{runs[0]['step bytes'] / 2**20:.0f} MiB",
        ", ".join(f"{value:.2f}" for value in seconds.values()),
    ]


def _layers_a_step(layers: int, fields: dict) -> str:
    counts = fields.get("layers_per_block", [layers // fields["num_blocks"]])
    return str(counts[0]) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _cell(values: list[float], digits: int, spread: bool = True) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def seconds_of(rows: list[str], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Fastest seconds of 64 images by 30 Euler steps, and of an update of every block on 64 images; rows take turns."""
    torch.set_num_threads(1)
    steps = {row: steps_of(row) for row in rows}
    seconds = {row: {"sampling": math.inf, "update": math.inf} for row in rows}
    for _ in range(repeats):
        for row in rows:
            start = time.perf_counter()
            for _, optimizer, activate, loss in steps[row]:
                activate()
                loss().backward()
                optimizer.step()
                optimizer.zero_grad()
            seconds[row]["update"] = min(seconds[row]["update"], time.perf_counter() - start)
            model = steps[row][0][0].eval()
            start = time.perf_counter()
            model.predict([k % 10 for k in range(BATCH)], num_inference_steps=STEPS)
            seconds[row]["sampling"] = min(seconds[row]["sampling"], time.perf_counter() - start)
            model.train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cached runs, the models and the table")
    parser.add_argument("--updates", type=int, default=1500, help="updates of every parameter")
    parser.add_argument("--samples", type=int, default=2000)
    add_run_options(parser, ROWS)
    parser.add_argument("--seconds", action="store_true", help="measure the seconds of sampling instead")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    seconds_file = options.output / "seconds.json"
    if options.seconds:
        seconds = seconds_of(options.rows)
        seconds_file.write_text(json.dumps(seconds))
        print("\n".join(f"{row}: {found}" for row, found in seconds.items()))
        return

    data_file, classifier_file = options.output / "data.pt", options.output / "classifier.pt"
    if not data_file.is_file():
        torch.save(load_data(options.data), data_file)
    data = torch.load(data_file)
    classifier = trained_classifier(data, classifier_file)
    settings = {
        "updates": options.updates, "samples": options.samples, "output": str(options.output), "data": data_file,
        "classifier": classifier_file,
    }  # fmt: skip
    results = results_of(run, ROWS, options.rows, options.seeds, settings, options.output, options.processes)
    features = [in_batches(classifier.features, data[split][0]).double().numpy() for split in ("train", "test")]
    floor = frechet_distance(features[0][: options.samples], features[1])
    seconds = json.loads(seconds_file.read_text()) if seconds_file.is_file() else {}
    report(results, table(results, seconds, floor), options.updates, options.output)


if __name__ == "__main__":
    main()
