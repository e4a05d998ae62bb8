"""How fast text models generate, beside the plain model, in one run on one thread.

    python benchmarks/generation_speed.py

Tokens a second of CPU time for greedy generation with the KV cache, each token at the fastest of interleaved repetitions, as a
ratio to the plain model's; and milliseconds a token in the first and last quarter of the new tokens, with the cache and
without: flat where the cache works, growing where everything is run again.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from gutenberg import config_for
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import hf_diffusionblocks as db

FORMULATIONS = {
    "recommended": {"local_head_layers": 0},
    "paper, T=B": {"preset": "paper"},
}


class Clock(BaseStreamer):
    """CPU time at which each token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.process_time())

    def end(self):
        pass


def generate(model, prompt: torch.Tensor, new_tokens: int, use_cache: bool) -> list[float]:
    """Seconds of each new token after the first, whose time is the prompt's."""
    clock = Clock()
    model.generate(
        prompt, max_new_tokens=new_tokens, do_sample=False, use_cache=use_cache, streamer=clock, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return [after - before for before, after in zip(clock.times[1:], clock.times[2:])]


def milliseconds(runs: list[list[float]], part: slice) -> float:
    """A token's, each at its fastest: what other work on the machine adds is left out."""
    return 1000 * statistics.mean(list(map(min, zip(*runs)))[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt2", choices=["gpt2", "llama"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    prompt = torch.randint(1, options.vocab_size, (1, 16))
    length = max(2 * options.new_tokens, prompt.shape[1] + options.new_tokens)
    config = config_for(options.family, options.layers, options.width, options.vocab_size, length)
    models = {"plain": AutoModelForCausalLM.from_config(config).eval()}
    for name, fields in FORMULATIONS.items():
        models[name] = db.convert(config, options.num_blocks, **fields).eval()
    runs = {(name, cached): [] for name in models for cached in (True, False)}
    for repetition in range(options.repetitions + 1):
        for name, cached in runs:
            if cached or repetition < 2:  # one of these is enough: they are long
                seconds = generate(models[name], prompt, options.new_tokens, cached)
                if repetition:  # the first warms up
                    runs[name, cached].append(seconds)

    quarter = options.new_tokens // 4
    plain = milliseconds(runs["plain", True], slice(None))
    print(
        f"{options.family} {options.layers} layers, width {options.width}, vocabulary {options.vocab_size}, "
        f"B={options.num_blocks}, {options.new_tokens} new tokens, batch 1, 1 thread\n\n"
        "| | tokens/s | over plain | ms a token, cached: first, last quarter | not cached: first, last |\n|---|---|---|---|---|"
    )
    for name in models:
        own = milliseconds(runs[name, True], slice(None))
        quarters = [
            milliseconds(runs[name, cached], part)
            for cached in (True, False)
            for part in (slice(quarter), slice(-quarter, None))
        ]
        print(
            f"| {name} | {1000 / own:.0f} | {plain / own:.2f}x | {quarters[0]:.1f}, {quarters[1]:.1f} | "
            f"{quarters[2]:.1f}, {quarters[3]:.1f} |"
        )


if __name__ == "__main__":
    main()
