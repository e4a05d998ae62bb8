"""Seconds of a streamed training step beside the stock model's with checkpointing, on the CPU, where copies are real.

    python benchmarks/streamed_step.py --output benchmarks/results/streamed_step.json

A Llama of 52 MiB, 4 x 256 tokens, AdamW, clipping; one thread; steps of each in turn, CPU seconds, the median of the ratios.
If DeepSpeed is installed, its ZeRO-3 with offload as well, with checkpointing and otherwise at its defaults: these let up to a
billion parameters stay on the device, so of this model it copies less than is copied here.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zero3 import process_group, zero3_with_offload

import hf_diffusionblocks as db

CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip


def checkpointed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def stepping(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(model: nn.Module, step: Callable[[], None], ids: torch.Tensor) -> float:
    """CPU seconds of a step."""
    start = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    step()
    return time.process_time() - start


def ratio(seconds: Sequence[float], stock: Sequence[float]) -> dict:
    ratios = sorted(own / other for own, other in zip(seconds, stock))
    quartiles = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
    return {"ratio": statistics.median(ratios), "ratio_quartiles": quartiles}


def compare(steps: int) -> dict:
    torch.manual_seed(0)
    streamed = LlamaForCausalLM(CONFIG).train()
    stock = checkpointed(streamed)
    ways = {"stock": (stock, stepping(stock)), "streamed": (streamed, stepping(streamed))}
    if find_spec("deepspeed"):
        ways["deepspeed"] = zero3_with_offload(checkpointed(streamed), pinned=False, gradient_clipping=1.0)
    stream = db.stream_layers(streamed, device="cpu")
    ids = torch.randint(CONFIG.vocab_size, (4, 256))
    rounds = [[seconds_of(*way, ids) for way in ways.values()] for _ in range(steps + 2)][2:]
    seconds = dict(zip(ways, zip(*rounds)))
    found = {
        "stock_seconds": statistics.median(seconds["stock"]), **ratio(seconds["streamed"], seconds["stock"]),
        "peak_units": stream.peak_units, "equal_weights": all(map(torch.equal, stock.parameters(), streamed.parameters())),
        "steps": steps,
    }  # fmt: skip
    if "deepspeed" in ways:
        found["deepspeed"] = {"version": version("deepspeed"), **ratio(seconds["deepspeed"], seconds["stock"])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each that count, after two that warm up")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with process_group() if find_spec("deepspeed") else nullcontext():
        found = compare(options.steps)
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
