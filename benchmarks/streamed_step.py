"""Seconds of a streamed training step beside the stock model's with checkpointing, on the CPU, where copies are real.

    python benchmarks/streamed_step.py --output benchmarks/results/streamed_step.json

A Llama of 52 MiB, 4 x 256 tokens, AdamW, clipping; one thread; steps of both in turn, CPU seconds, the median of the ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_diffusionblocks as db

CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """CPU seconds of one."""
    start = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps that count, after two that warm up")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    streamed = LlamaForCausalLM(CONFIG).train()
    stock = copy.deepcopy(streamed)
    stock.activation_checkpointing_enable({"use_reentrant": False})
    stream = db.stream_layers(streamed, device="cpu")
    ids = torch.randint(CONFIG.vocab_size, (4, 256))
    runs = [(model, torch.optim.AdamW(model.parameters(), fused=True)) for model in (stock, streamed)]
    seconds = [[step(*run, ids) for run in runs] for _ in range(options.steps + 2)][2:]
    ratios = sorted(after / before for before, after in seconds)
    found = {
        "stock_seconds": statistics.median(before for before, _ in seconds), "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]], "peak_units": stream.peak_units,
        "equal_weights": all(map(torch.equal, stock.parameters(), streamed.parameters())), "steps": options.steps,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
