"""Two processes that train different blocks at a time, beside one that trains them in turn: block-steps a second.

    python benchmarks/block_parallel.py

GPT-2 of 8 layers, width 256, B=2, 4 x 256 tokens, AdamW, by the Trainer under `accelerate launch` (gloo), one thread a
process, in one run: the processes of each row run alone, one row after another, and the rounds are repeated. A block-step is
one optimizer step of one block. The figure is that of the fastest round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GPT2Config, TrainerCallback

import hf_diffusionblocks as db

LAUNCH = "accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
#: Row -> fields of `convert`
FORMULATIONS = {
    "independent, own embeddings and head (nothing communicated)": {"denoiser": "factorized", "shared": "per_block"},
    "independent, shared parameters averaged": {"denoiser": "factorized"},
    "carried (recommended): shared averaged, blocks exchanged at every step": {
        "denoiser": "factorized", "context": "carried", "prior_fraction": 1.0
    },
}  # fmt: skip
WARM_UP, STEPS = 3, 15


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end of the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", 0.0)


def worker(name: str, result: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=8, n_embd=256, n_head=4, vocab_size=4096, n_positions=256)
    model = db.convert(config, 2, preset="paper", **FORMULATIONS[name])
    tokens = torch.randint(4096, (128, 256)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        args = db.DiffusionBlocksTrainingArguments(
            folder, max_steps=WARM_UP + STEPS, per_device_train_batch_size=4, use_cpu=True, block_parallel=True,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")
        clock = Clock()
        db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=data, callbacks=[clock]).train()
    if args.process_index == 0:
        result.write_text(json.dumps(args.world_size * STEPS / clock.seconds))


def block_steps_per_second(name: str, processes: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = ["--multi_gpu"] if processes > 1 else []
        command = [sys.executable, "-m", *LAUNCH.split(), *options, "--num_processes", str(processes), __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--worker", name, str(result)], check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]))
        return
    print("| | block-steps/s, 1 process | 2 processes | ratio |\n|---|---|---|---|")
    for name in FORMULATIONS:
        one, two = (max(block_steps_per_second(name, count) for _ in range(options.rounds)) for count in (1, 2))
        print(f"| {name} | {one:.2f} | {two:.2f} | {two / one:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
