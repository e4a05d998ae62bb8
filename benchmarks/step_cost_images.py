"""What training a ViT block by block costs, beside end to end, in one run: time and bytes of a step.

    python benchmarks/step_cost_images.py

"Time" is that of B block-steps (one update of every block) over one end-to-end step, each step at its fastest of interleaved
repetitions: forward, backward and AdamW. Bytes are those of one block's step over the end-to-end step's: what autograd
stores for the backward pass, and gradients; the largest of the blocks. "Together" is a step of the Trainer that trains
all blocks; its time is that of the whole step, without clipping.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from transformers import ViTConfig, ViTForImageClassification
from whole_steps import WholeSteps

import hf_diffusionblocks as db

FORMULATIONS = {
    "paper": {"preset": "paper"},
    "recommended": {},
    "recommended, together": {"together": True},
    "recommended, local head": {"local_head_layers": 1},
}


class Subject:
    """A model with its optimizer, and the calls that update all its parameters once."""

    def __init__(self, model, batch: dict[str, torch.Tensor], blocks: list[int | None]):
        self.model, self.batch, self.blocks = model.train(), batch, blocks
        self.optimizer = torch.optim.AdamW(model.parameters())

    def step(self, block: int | None) -> None:
        self.optimizer.zero_grad()
        self._loss(block).backward()
        self.optimizer.step()

    def _loss(self, block: int | None) -> torch.Tensor:
        return self.model(**self.batch, **({} if block is None else {"block_index": block})).loss

    def seconds(self) -> list[float]:
        """Of each block's step."""
        taken = []
        for block in self.blocks:
            start = time.process_time()
            self.step(block)
            taken.append(time.process_time() - start)
        return taken

    def bytes(self) -> tuple[int, int]:
        """Stored activations and gradients of the largest block's step."""
        ledgers = [db.measure_memory(self.model, self.optimizer, partial(self._loss, block)) for block in self.blocks]
        return tuple(max(getattr(ledger.parts, part) for ledger in ledgers) for part in ("activations", "gradients"))


def fastest(runs: list[list[float]]) -> float:
    """Seconds of a round, each block's step at its fastest: what other work on the machine adds is left out."""
    return sum(map(min, zip(*runs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128, help="the paper's ViT is 12 layers of width 128")
    parser.add_argument("--num_blocks", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=options.layers, hidden_size=options.width, intermediate_size=4 * options.width,
        num_attention_heads=4, image_size=32, patch_size=4, num_channels=3, num_labels=100,
    )  # fmt: skip
    batch = {
        "pixel_values": torch.randn(options.batch_size, 3, 32, 32),
        "labels": torch.randint(100, (options.batch_size,)),
    }
    subjects = {"end to end": Subject(ViTForImageClassification(config), batch, [None])}
    for name, fields in FORMULATIONS.items():
        fields = dict(fields)
        together = fields.pop("together", False)
        model = db.convert(config, options.num_blocks, **fields)
        blocks = list(range(options.num_blocks))
        subjects[name] = WholeSteps(model, batch) if together else Subject(model, batch, blocks)

    sizes = {name: subject.bytes() for name, subject in subjects.items()}
    for subject in subjects.values():
        subject.seconds()  # warm up
    times: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for _ in range(options.repetitions):
        for name, subject in subjects.items():
            times[name].append(subject.seconds())

    base_time, base_size = fastest(times["end to end"]), sizes["end to end"]
    print(
        f"ViT {options.layers} layers, width {options.width}, B={options.num_blocks}, batch {options.batch_size}, "
        f"{options.threads} thread(s); end to end: {base_time:.3f} s a step, {base_size[0] / 2**20:.1f} MiB "
        f"activations, {base_size[1] / 2**20:.1f} MiB gradients\n"
    )
    print("| | time of B block-steps | activations | gradients |\n|---|---|---|---|")
    for name in FORMULATIONS:
        ratios = (fastest(times[name]) / base_time, *(own / base for own, base in zip(sizes[name], base_size)))
        print(f"| {name} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |")


if __name__ == "__main__":
    main()
