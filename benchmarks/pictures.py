"""The pictures in docs/.

    python benchmarks/pictures.py         # both
    python benchmarks/pictures.py memory  # one of: partition, memory

- `noise_partition.png`: how the noise is cut into four blocks, with the config's own defaults.
- `memory_8b.svg`: what a training step of Llama-3.1-8B holds at its peak, by what `benchmarks/estimates.py` found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from transformers import LlamaConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.schedule import NoiseSchedule
from hf_diffusionblocks.recipes.plots import plot_noise_partition

#: Row of the estimate -> its name in the picture
ROWS = {
    "end to end": "end to end",
    "end to end, checkpointing": "end to end, checkpointing",
    "recommended: all blocks together": "8 blocks together, losses of their own",
    "end to end, checkpointing, optimizer in the backward pass": "optimizer in the backward pass, checkpointing",
    "end to end, checkpointing, 8-bit AdamW (by formula)": "8-bit AdamW, checkpointing (by formula)",
    "recommended: job, shared part frozen, around the earlier blocks": "a job of one of 8 blocks, own loss",
    "LoRA (r=16, attention), checkpointing": "LoRA, checkpointing",
    "QLoRA (r=16, attention), checkpointing (by formula)": "QLoRA, checkpointing (by formula)",
    "FSDP2 with CPU offload, checkpointing (by formula)": "FSDP2 with CPU offload (by formula)",
    "streamed, everything trained": "streamed, everything trained",
    "streamed, LoRA (r=16, attention)": "streamed, LoRA",
}
#: What is drawn as one part -> its colour, and the ledger's parts
PARTS = {
    "parameters": ("#7d8893", ("shared", "blocks", "adaln")),
    "gradients": ("#d1495b", ("gradients",)),
    "optimizer state": ("#edae49", ("optimizer",)),
    "activations and the rest": ("#30638e", ("activations", "logits", "rest")),
}
INK, MUTED, QUIET = "#22303c", "#66727e", "#c3ccd4"


def partition(folder: Path) -> None:
    schedule: NoiseSchedule = db.DiffusionBlocksConfig(
        source_config=LlamaConfig(), num_blocks=4, preset="paper"
    ).noise_schedule()
    plot_noise_partition(schedule, folder / "noise_partition.png")


def memory(folder: Path, estimates: Path) -> None:
    file = estimates / "8B.json"
    if not file.is_file():
        raise SystemExit(f"pictures.py: error: there is no {file}; `benchmarks/estimates.py --cases 8B` first")
    found = json.loads(file.read_text())
    draw_memory({title: found[name]["peak"] for name, title in ROWS.items()}, folder / "memory_8b.svg")


def draw_memory(peaks: Mapping[str, Mapping[str, int]], file: Path) -> None:
    """Bars of what is there at the peak, by parts."""
    figure = Figure(figsize=(9, 0.8 + 0.5 * len(peaks)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows, left = range(len(peaks)), [0.0] * len(peaks)
    for part, (colour, names) in PARTS.items():
        widths = [sum(peak[name] for name in names) / 2**30 for peak in peaks.values()]
        axes.barh(rows, widths, left=left, color=colour, height=0.62, label=part)
        left = [start + width for start, width in zip(left, widths)]
    beneath = {"facecolor": "white", "linewidth": 0, "pad": 1}
    for row, end in enumerate(left):
        axes.text(end + 0.6, row, f"{end:.1f}", va="center", fontsize=9, color=INK, bbox=beneath)
    axes.set_yticks(rows, list(peaks), fontsize=9, color=INK)
    axes.set_ylim(len(peaks) - 0.5, -0.7)  # the first on top
    axes.set_xlim(0, 1.08 * max(left))
    axes.axvline(24, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.text(24.5, -0.55, "24 GiB", fontsize=8, color=MUTED, va="center")
    axes.set_xlabel("GiB at the peak of a training step", fontsize=9, color=MUTED)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=MUTED, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=INK)
    axes.set_title("Training Llama-3.1-8B, estimated: 1 x 2048 tokens, bf16, AdamW", fontsize=11, color=INK, loc="left")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["partition", "memory"]
    parser.add_argument("pictures", nargs="*", default=every, help=f"of {', '.join(every)}; all, if none is named")
    results = Path("benchmarks/results/estimates")
    parser.add_argument("--estimates", type=Path, default=results, help="what benchmarks/estimates.py wrote")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the pictures")
    options = parser.parse_args()
    if unknown := set(options.pictures) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(every)}")
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "docs"})  # small files, the same every time
    for name in options.pictures:
        if name == "partition":
            partition(options.output)
        else:
            memory(options.output, options.estimates)


if __name__ == "__main__":
    main()
