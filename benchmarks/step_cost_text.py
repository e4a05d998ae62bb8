"""What training a GPT-2 block by block costs, beside end to end, in one run: time, floor and bytes of a step.

    python benchmarks/step_cost_text.py

"Time" is CPU time of B block-steps (one update of every block: forward, backward and AdamW) over that of one
end-to-end step, each step at its fastest of interleaved repetitions; the end-to-end model reads out in the same chunks.
"Floor" is the same ratio by counted multiplications (a backward pass counts as two forward ones): the head runs B times,
the paper's blocks run clean and noisy tokens, and recommended ones in turn run the earlier blocks. Bytes are those of
one block's step over the end-to-end step's: what autograd stores for the backward pass, and gradients; the largest of
the blocks. "Together" is a step of the Trainer that trains all blocks: its time is that of the whole step, without
clipping, and its floor has no repeats of earlier blocks.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from gutenberg import config_for
from transformers import AutoModelForCausalLM
from whole_steps import WholeSteps

import hf_diffusionblocks as db
from hf_diffusionblocks.models.causal_lm.task import plain_loss

FORMULATIONS = {
    "recommended": {"local_head_layers": 0},
    "recommended, together": {"local_head_layers": 0, "together": True},
    "paper": {"preset": "paper"},
}


def floor(fields: dict, options: argparse.Namespace, vocab_size: int) -> float:
    """B block-steps over one end-to-end step, by multiplications a token (METHOD: the head runs B times)."""
    width, layers, blocks = options.width, options.layers, options.num_blocks
    attention = options.length * width  # causal: scores and sums over half of the tokens
    layer, keys_values, head = 12 * width**2 + attention, 2 * width**2, vocab_size * width
    active = layers * layer
    if fields.get("preset") == "paper":
        active = 2 * layers * layer - blocks * (layer - keys_values)  # a block's last clean layer: keys and values
    again = 0.0  # layers that run forward only
    if "preset" not in fields and "together" not in fields:
        again = (blocks - 1) / 2 * layers * layer
    return (3 * (active + blocks * head) + again) / (3 * (layers * layer + head))


class Subject:
    """A model with its optimizer, and the calls that update all its parameters once."""

    def __init__(self, model, tokens: torch.Tensor, blocks: list[int | None]):
        self.model, self.tokens, self.blocks = model.train(), tokens, blocks
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def loss(self, block: int | None) -> torch.Tensor:
        if block is None:
            return plain_loss(self.model, labels=self.tokens, input_ids=self.tokens)
        return self.model(self.tokens, labels=self.tokens, block_index=block).loss

    def step(self, block: int | None) -> None:
        self.optimizer.zero_grad()
        self.loss(block).backward()
        self.optimizer.step()

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
        ledgers = [db.measure_memory(self.model, self.optimizer, partial(self.loss, block)) for block in self.blocks]
        return tuple(max(getattr(ledger.parts, part) for ledger in ledgers) for part in ("activations", "gradients"))


def fastest(runs: list[list[float]]) -> float:
    """Seconds of a round, each block's step at its fastest: what other work on the machine adds is left out."""
    return sum(map(min, zip(*runs)))


def compare(vocab_size: int, options: argparse.Namespace) -> str:
    """One table, markdown."""
    torch.manual_seed(0)
    config = config_for("gpt2", options.layers, options.width, vocab_size, options.length)
    tokens = torch.randint(vocab_size, (options.batch_size, options.length))
    subjects = {"end to end": Subject(AutoModelForCausalLM.from_config(config), tokens, [None])}
    for name, fields in FORMULATIONS.items():
        fields = dict(fields)
        together = fields.pop("together", False)
        model = db.convert(config, options.num_blocks, **fields)
        blocks = list(range(options.num_blocks))
        batch = {"input_ids": tokens, "labels": tokens}
        subjects[name] = WholeSteps(model, batch) if together else Subject(model, tokens, blocks)
    sizes = {name: subject.bytes() for name, subject in subjects.items()}
    for subject in subjects.values():
        subject.seconds()  # warm up
    times: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for _ in range(options.repetitions):
        for name, subject in subjects.items():
            times[name].append(subject.seconds())

    base_time, base_size = fastest(times["end to end"]), sizes["end to end"]
    lines = [
        f"GPT-2 {options.layers} layers, width {options.width}, vocabulary {vocab_size}, B={options.num_blocks}, "
        f"{options.batch_size} x {options.length} tokens, {options.threads} thread(s); end to end: {base_time:.3f} s a "
        f"step, {base_size[0] / 2**20:.1f} MiB activations, {base_size[1] / 2**20:.1f} MiB gradients",
        "",
        "| | time of B block-steps | floor | time over floor | activations | gradients |",
        "|---|---|---|---|---|---|",
    ]
    for name, fields in FORMULATIONS.items():
        ratio, least = fastest(times[name]) / base_time, floor(fields, options, vocab_size)
        of_bytes = (own / base for own, base in zip(sizes[name], base_size))
        lines.append(
            f"| {name} | {ratio:.2f}x | {least:.2f}x | {ratio / least:.2f} | "
            + " | ".join(f"{size:.2f}x" for size in of_bytes)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab_sizes", type=int, nargs="*", default=[512, 32768])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for vocab_size in options.vocab_sizes:
        print(compare(vocab_size, options), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
