"""What checkpointing alone saves of the memory of a training step, in the models that blocks are compared with.

    python benchmarks/checkpointed_steps.py --output benchmarks/results/checkpointed_steps.json

The plain models, and blocks, of quality_text.py, quality_masked.py and quality_generation.py, on tokens and images drawn at
random: peak bytes of a step by the ledger, stock and with activation checkpointing. Of blocks, the one that holds most, in a run
that trains all of them: the optimizer holds the state of all. (quality_masked.py and quality_generation.py count that of one.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import quality_generation
import quality_masked
import quality_text
import torch
from characters import ALPHABET
from gutenberg import config_for
from ladder import ROWS
from torch import nn

import hf_diffusionblocks as db
from hf_diffusionblocks.models.causal_lm.task import plain_loss

#: Task -> its rows
TASKS = {
    "characters": ("end to end, 8 layers", "B=4, own loss, local head of one layer"),
    "masked text": ("end to end, 6 layers", "B=3 of 2 layers (paper)", "B=3 of 6 layers"),
    "images": ("end to end, 6 layers", "B=3 of 2 layers, own ends", "B=2 of 3 layers, own ends", "B=3 of 6 layers"),
}


def new_model(task: str, row: str) -> nn.Module:
    if task == "characters":
        config = config_for("llama", ROWS[row].layers, quality_text.WIDTH, len(ALPHABET), quality_text.LENGTH)
        return quality_text.new_model(ROWS[row], config)
    if task == "masked text":
        return quality_masked.new_model(*quality_masked.ROWS[row])
    layers, fields = quality_generation.ROWS[row]
    plain = quality_generation.plain_config(layers)
    return db.convert(plain, preset="paper", sigma_data=quality_generation.SIGMA_DATA, **fields)


def batch_of(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes in, and labels or classes."""
    if task == "images":
        return torch.randn(quality_generation.BATCH, 1, 28, 28), torch.randint(10, (quality_generation.BATCH,))
    tokens = torch.randint(len(ALPHABET), (quality_text.BATCH_SIZE, quality_text.LENGTH))
    return tokens, tokens


def losses(model: nn.Module, task: str) -> list[tuple[list[nn.Parameter], Callable[[], torch.Tensor]]]:
    """Of each block, or of a plain model: what a step trains, and its loss."""
    given, wanted = batch_of(task)
    if not isinstance(model, db.DiffusionBlocksPreTrainedModel):
        return [(list(model.parameters()), lambda: plain_loss(model, labels=wanted, input_ids=given))]
    name = "class_labels" if task == "images" else "labels"

    def step_of(k: int) -> tuple[list[nn.Parameter], Callable[[], torch.Tensor]]:
        trained = [*model.block_parameters(k), *model.shared_parameters()]
        return trained, lambda: model(given, **{name: wanted}, block_index=k).loss

    return [step_of(block.index) for block in model.blocks]


def peak_bytes(task: str, row: str, checkpointed: bool) -> int:
    torch.manual_seed(0)
    model = new_model(task, row).train()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer, peaks = torch.optim.AdamW(model.parameters(), fused=True), []
    for parameters, loss in 2 * losses(model, task):  # (once, and the optimizer has a state of every block)
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        peaks.append(db.measure_memory(model, optimizer, loss).total)
    return max(peaks[len(peaks) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for task, rows in TASKS.items():
        for row in rows:
            stock, checkpointed = (peak_bytes(task, row, each) for each in (False, True))
            found.append({"task": task, "row": row, "step bytes": stock, "step bytes, checkpointing": checkpointed})
            print(f"{task}, {row}: {stock / 2**20:.1f} MiB, with checkpointing {checkpointed / 2**20:.1f}")
    if options.output:
        options.output.write_text("[\n " + ",\n ".join(map(json.dumps, found)) + "\n]\n")


if __name__ == "__main__":
    main()
