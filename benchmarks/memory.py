"""What a training step holds in memory, and how many there are in a second: end to end, streamed, and block by block.

    python benchmarks/memory.py --output outputs/memory

GPT-2 small (4 x 512 tokens, dropout 0.1 as its config has it) and ViT-B/16 (images of 224 x 224, no dropout) at real size
with fresh weights, B=4, AdamW, float32; on a GPU if there is one, else on CPU threads (`--threads`). Of each way to train,
the ledger of a real step (`db.measure_memory`): every part at its largest, their sum, and the peak, the most that was
there at one moment. Of the blocks, the one that holds most. LoRA is peft's, r=16, on all matrices of the attention.

"By count" is what the sum should be: 4 bytes a parameter (and saved buffer) held, 12 a trained one (gradient and AdamW's
two moments), what autograd keeps for the backward pass (counted on the same step, by storage) and one chunk of logits
with its gradient (of a stock model, its logits as they are counted). It asserts that the measured sum is within 5 % of it. The
peak is lower where gradients come only as activations go, and higher by temporary tensors. What is streamed is not all on the
device: no sum by count.

Steps a second are block-steps, each on the same batch: the fastest of `--repetitions` (after the one that is measured),
the mean of the first and the last block. The same tokens through all B blocks take B of them. ("Together": a block's part
of a step, without the forward pass before it; benchmarks/step_cost_text.py times whole steps.)

Writes `memory.md` and `memory.svg` to the output folder; `--models` chooses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.objectives import rows_per_chunk
from hf_diffusionblocks.memory.scenarios import Step, steps
from hf_diffusionblocks.memory.table import ledger_table
from hf_diffusionblocks.memory.ways import (
    Way, Workload, formulations_for, ways_of_blocks, ways_of_stock_models, ways_of_streams
)  # fmt: skip

#: Of a ledger's parts, the colour in the chart.
COLOURS = {
    "shared": "#4d4d4d", "blocks": "#8c8c8c", "adaln": "#c9c9c9", "gradients": "#c44e52", "optimizer": "#dd8452",
    "activations": "#4c72b0", "logits": "#8172b3",
}  # fmt: skip
MIB = 2**20


def workload_of(model: str, num_blocks: int, images: int) -> Workload:
    if model == "GPT-2 small":
        return Workload(GPT2Config(), num_blocks, batch_size=4, sequence_length=512)
    return Workload(ViTConfig(num_labels=1000), num_blocks, batch_size=images, sequence_length=None)


def by_count(step: Step, ledger: db.Ledger, workload: Workload, is_stock: bool) -> int:
    """The sum of parts, from the number of parameters; activations as they were counted."""
    held = sum({id(t): t.numel() for t in (*step.model.parameters(), *step.model.buffers())}.values())
    trained = sum(p.numel() for p in step.model.parameters() if p.grad is not None)
    moving = sum(p.numel() for group in step.optimizer.param_groups for p in group["params"])
    logits = workload.batch_size * 1000
    if workload.sequence_length is not None:
        vocab_size = workload.config.vocab_size
        rows = workload.batch_size * (workload.sequence_length - 1)
        logits = rows_per_chunk(rows, vocab_size, step.model.device) * vocab_size
    of_logits = ledger.parts.logits if is_stock else 8 * logits
    return 4 * (held + trained + 2 * moving) + of_logits + ledger.parts.activations


def seconds(step: Step, repetitions: int) -> float:
    """Of a whole step, the fastest repetition."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        step.loss().backward()
        step.optimizer.step()
        step.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measured(way: Way, workload: Workload, repetitions: int) -> tuple[db.Ledger, int | None, float]:
    """The largest step's ledger and its sum by count, and steps a second."""
    found, times = [], []
    for step in steps(way, workload):
        if step.stream:
            seconds(step, 1)  # the order of units is learned
        with db.StepMemory(step.model, step.optimizer, kept=step.kept) as memory:
            step.loss().backward()
        step.optimizer.step()
        ledger = memory.ledger()
        found.append((ledger, None if step.stream else by_count(step, ledger, workload, way.fields is None)))
        step.optimizer.zero_grad()
        times.append(seconds(step, repetitions))
    return *max(found, key=lambda pair: pair[0].total), len(times) / sum(times)


def report(model: str, workload: Workload, repetitions: int) -> tuple[str, dict[str, db.Ledger]]:
    """The table of a model, and its ledgers."""
    ledgers, counted, speed = {}, {}, {}
    formulations = formulations_for(workload.task, workload.config)
    for way in (*ways_of_stock_models(), *ways_of_streams(), *ways_of_blocks(workload.task, formulations)):
        torch.manual_seed(0)
        ledgers[way.name], count, rate = measured(way, workload, repetitions)
        counted[way.name] = "" if count is None else f"{count / MIB:,.0f}"
        speed[way.name] = f"{rate:.3f}"
        total = ledgers[way.name].parts.total
        if count is not None and abs(total / count - 1) > 0.05:
            raise AssertionError(f"{way.name}: {total} bytes are measured, and {count} by count")
        print(f"{model}, {way.name}: {total / MIB:,.0f} MiB, {rate:.3f} steps/s", flush=True)
    columns = {"by count": counted}
    if torch.cuda.is_available():
        columns["max_memory_allocated"] = {name: f"{each.allocated / MIB:,.0f}" for name, each in ledgers.items()}
    columns["steps/s"] = speed
    size = (
        f"{workload.batch_size} x {workload.sequence_length} tokens"
        if workload.sequence_length
        else (f"{workload.batch_size} images")
    )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    title = f"{model}, B={workload.num_blocks}, {size}, float32, AdamW, {where}"
    return f"{title}\n\n{ledger_table(ledgers, columns)}\n", ledgers


def draw(of_model: Mapping[str, Mapping[str, db.Ledger]], file: Path) -> None:
    """Parts as stacked bars, and the peak as a mark."""
    figure, panels = plt.subplots(len(of_model), 1, figsize=(10, 4.2 * len(of_model)), squeeze=False)
    for panel, (model, ledgers) in zip(panels[:, 0], of_model.items()):
        names, left = list(ledgers)[::-1], [0.0] * len(ledgers)
        for part, colour in COLOURS.items():
            widths = [asdict(ledgers[name].parts)[part] / 2**30 for name in names]
            panel.barh(names, widths, left=left, color=colour, label=part)
            left = [start + width for start, width in zip(left, widths)]
        panel.plot([ledgers[name].total / 2**30 for name in names], names, "k|", markersize=12, label="peak")
        panel.set_title(model, loc="left")
        panel.set_xlabel("GiB of a training step")
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="lower center")
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))  # above the legend
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the chart")
    parser.add_argument("--models", nargs="*", default=["GPT-2 small", "ViT-B"], choices=["GPT-2 small", "ViT-B"])
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--images", type=int, default=8, help="of a step of ViT-B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    options.output.mkdir(parents=True, exist_ok=True)
    tables, ledgers = [], {}
    for model in options.models:
        workload = workload_of(model, options.num_blocks, options.images)
        table, ledgers[model] = report(model, workload, options.repetitions)
        tables.append(table)
        print(table, flush=True)
    (options.output / "memory.md").write_text("\n".join(tables))
    draw(ledgers, options.output / "memory.svg")


if __name__ == "__main__":
    main()
