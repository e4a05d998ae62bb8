"""The pictures in docs/, and the table of memory at 8 billion parameters in README.md.

    make demo && python benchmarks/pictures.py                # all three; a minute or two
    python benchmarks/pictures.py memory                      # one of: partition, memory, walk

- `noise_partition.png`: how the noise is cut into four blocks, with the config's own defaults.
- `memory_8b.svg`: what a training step of Llama-3.1-8B holds at its peak, by `db.estimate_memory`: the step is followed
  on tensors without memory, so any machine will do. Prints the whole table, too.
- `walk.png`: a walk from noise to a label, by the model that the demo trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from transformers import LlamaConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.schedule import NoiseSchedule
from hf_diffusionblocks.recipes.plots import plot_noise_partition, plot_walk

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
#: Row of `estimate_memory` -> its name in the picture
ROWS = {
    "end to end": "end to end",
    "end to end, checkpointing": "end to end, checkpointing",
    "recommended: all blocks together, exact gradient": "all 8 blocks in each step, exact gradient",
    "LoRA (r=16, attention)": "LoRA",
    "recommended: all blocks, inactive ones in host memory": "all 8 blocks in turn, own loss, others in host memory",
    "LoRA (r=16, attention), checkpointing": "LoRA, checkpointing",
    "recommended: all blocks together, exact gradient, checkpointing, inactive ones in host memory":
        "all 8 blocks in each step, exact gradient,\ncheckpointing, others in host memory",
    "recommended: all blocks together, exact gradient, checkpointing, inactive ones in host memory, shared part frozen":
        "the same, shared part frozen",
    "recommended: job, shared part frozen, cached inputs": "a job of one block, own loss, cached inputs",
}  # fmt: skip
#: What is drawn as one part -> its colour, and the ledger's parts
PARTS = {
    "parameters": ("#7d8893", ("shared", "blocks", "adaln")),
    "gradients": ("#d1495b", ("gradients",)),
    "optimizer state": ("#edae49", ("optimizer",)),
    "activations and the rest": ("#30638e", ("activations", "logits", "rest")),
}
INK, MUTED, QUIET = "#22303c", "#66727e", "#c3ccd4"
WALKS, STEPS = (0, 0.02, 0.05), 6  # images by how sure the first step is, from the least; steps of a walk


def partition(folder: Path) -> None:
    schedule: NoiseSchedule = db.DiffusionBlocksConfig(source_config=LLAMA_8B, num_blocks=4).noise_schedule(0.1)
    plot_noise_partition(schedule, folder / "noise_partition.png")


def memory(folder: Path) -> None:
    estimate = db.estimate_memory(LLAMA_8B, num_blocks=8, batch_size=1, sequence_length=2048, dtype="bf16", device="cuda")
    print(estimate)
    draw_memory({title: estimate.ledgers[name] for name, title in ROWS.items()}, folder / "memory_8b.svg")


def draw_memory(ledgers: Mapping[str, db.Ledger], file: Path) -> None:
    """Bars of what is there at the peak, by parts."""
    figure = Figure(figsize=(9, 0.8 + 0.5 * len(ledgers)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows, left = range(len(ledgers)), [0.0] * len(ledgers)
    for part, (colour, names) in PARTS.items():
        widths = [sum(asdict(ledger.peak)[name] for name in names) / 2**30 for ledger in ledgers.values()]
        axes.barh(rows, widths, left=left, color=colour, height=0.62, label=part)
        left = [start + width for start, width in zip(left, widths)]
    beneath = {"facecolor": "white", "linewidth": 0, "pad": 1}
    for row, (ledger, end) in enumerate(zip(ledgers.values(), left)):
        axes.text(end + 0.6, row, f"{ledger.total / 2**30:.1f}", va="center", fontsize=9, color=INK, bbox=beneath)
    axes.set_yticks(rows, list(ledgers), fontsize=9, color=INK)
    axes.set_ylim(len(ledgers) - 0.5, -0.7)  # the first on top
    axes.set_xlim(0, 1.08 * max(left))
    axes.axvline(24, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.text(24.5, -0.55, "24 GiB", fontsize=8, color=MUTED, va="center")
    axes.set_xlabel("GiB at the peak of a training step", fontsize=9, color=MUTED)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=MUTED, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=INK)
    axes.set_title("Llama-3.1-8B, 1 x 2048 tokens, bf16, AdamW", fontsize=11, color=INK, loc="left")
    figure.savefig(file, metadata={"Date": None})


def walk(folder: Path, demo: Path) -> None:
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    if not (demo / "diffusionblocks").is_dir():
        raise SystemExit(f"pictures.py: error: {demo} holds no trained model; `make demo` first")
    test = load_dataset("parquet", data_files=str(demo / "test.parquet"), split="train")
    images, labels = list(test["image"]), torch.tensor(test["label"])
    processor = AutoImageProcessor.from_pretrained(demo / "diffusionblocks")
    model = AutoModelForImageClassification.from_pretrained(demo / "diffusionblocks")
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    first = model.predict(pixel_values, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    order = first.trajectory[:, 0].amax(-1).argsort()
    chosen = [int(order[int(share * len(order))]) for share in WALKS]
    generator = torch.Generator().manual_seed(0)
    prediction = model.predict(pixel_values[chosen], num_inference_steps=STEPS, generator=generator)
    plot_walk([images[i] for i in chosen], labels[chosen], prediction, model.config.id2label, folder / "walk.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["partition", "memory", "walk"]
    parser.add_argument("pictures", nargs="*", default=every, help=f"of {', '.join(every)}; all, if none is named")
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="what `make demo` wrote")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the pictures")
    options = parser.parse_args()
    if unknown := set(options.pictures) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(every)}")
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "docs"})  # small files, the same every time
    for name in options.pictures:
        if name == "walk":
            walk(options.output, options.demo)
        else:
            {"partition": partition, "memory": memory}[name](options.output)


if __name__ == "__main__":
    main()
