"""What training steps would hold, by `db.estimate_memory`: the figures of README.md and docs/memory.md.

    python benchmarks/estimates.py --output outputs/estimates              # all; some minutes on an idle core
    python benchmarks/estimates.py --output outputs/estimates --cases 70B  # of 8B, 8B-streamed, 70B, recipes, gpt2, vit

Of each case a table (Markdown) and its numbers (JSON). No weights are read, and any machine will do. "8B" and "70B" have the
shapes of Llama-3.1; "recipes" are the steps of `recipes/configs/finetune_8b_*.yaml`, on Qwen3-8B.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, LlamaConfig, Qwen3Config, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.memory.costs import Costs
from hf_diffusionblocks.memory.scenarios import followed_stream
from hf_diffusionblocks.memory.ways import Workload, ways_of_streams

COMMON = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False}
LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **COMMON)
LLAMA_70B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **COMMON)
QWEN3_8B = Qwen3Config(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
)  # fmt: skip
#: Case -> what `estimate_memory` is given, for whole tables.
TABLES = {
    "8B": (LLAMA_8B, {"num_blocks": 8, "sequence_length": 2048, "dtype": "bf16", "device": "cuda", "tflops": 200}),
    "gpt2": (GPT2Config(), {"num_blocks": 4, "batch_size": 4, "sequence_length": 512, "device": "cpu"}),
    "vit": (ViTConfig(num_labels=1000), {"num_blocks": 4, "batch_size": 8, "device": "cpu"}),
}
#: Case -> config, and the workloads of which only "streamed, everything trained" is estimated: rows, tokens, dtype, bf16=True
#: or not.
STREAMED = {
    "8B-streamed": (
        LLAMA_8B,
        [(n, s, *kept) for n, s in ((1, 2048), (8, 1024)) for kept in ((torch.bfloat16, False), (torch.float32, True))],
    ),
    "70B": (LLAMA_70B, [(1, 2048, torch.bfloat16, False)]),
    "recipes": (QWEN3_8B, [(n, 1024, torch.bfloat16, False) for n in (16, 4)]),
}


def numbers(ledger: db.Ledger, costs: Costs | None) -> dict:
    """Bytes of a way."""
    return {
        "device": ledger.total, "host": ledger.host, "peak": asdict(ledger.peak), "largest": asdict(ledger.parts),
        **({"costs": asdict(costs)} if costs else {}),
    }  # fmt: skip


def table(case: str) -> tuple[str, dict]:
    """Of all ways to train: the table, and the numbers of each way."""
    config, options = TABLES[case]
    estimate = db.estimate_memory(config, **options)
    return str(estimate), {name: numbers(each, estimate.costs.get(name)) for name, each in estimate.ledgers.items()}


def streamed(case: str) -> tuple[str, dict]:
    """The same, of streamed layers alone, everything trained: a row for each workload."""
    config, workloads = STREAMED[case]
    way = ways_of_streams()[0]
    found, lines = {}, ["| tokens | weights on the host | device, GiB | host, GiB | copied, GB | back, GB |", "|---" * 6 + "|"]
    for batch_size, length, dtype, bf16 in workloads:
        workload = Workload(config, None, batch_size, length, dtype, bf16=bf16)
        ledger, costs = followed_stream(way, workload, FakeTensorMode(allow_non_fake_inputs=True))
        kept = f"{str(dtype).removeprefix('torch.')}{', bf16=True' if bf16 else ''}"
        found[f"{batch_size} x {length}, {kept}"] = numbers(ledger, costs)
        cells = (ledger.total / 2**30, ledger.host / 2**30, costs.to_device / 1e9, costs.to_host / 1e9)
        lines.append(f"| {batch_size} x {length} | {kept} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*TABLES, *STREAMED]
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and numbers")
    parser.add_argument("--cases", nargs="*", default=every, choices=every)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        text, found = table(case) if case in TABLES else streamed(case)
        (options.output / f"{case}.md").write_text(f"{text}\n")
        (options.output / f"{case}.json").write_text(json.dumps(found) + "\n")
        print(f"{case}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
