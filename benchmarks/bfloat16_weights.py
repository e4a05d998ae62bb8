"""Weights in bfloat16 at small learning rates: what is lost beside float32 weights, and what stochastic rounding gives back.

    pip install torchao
    python benchmarks/bfloat16_weights.py --data ../shared/data/gutenberg --output benchmarks/results/bfloat16_weights.json

A Llama of characters (4 layers, width 128) is trained in float32, and then trained on, streamed, at a constant small rate:
float32 weights under bfloat16 autocast, and bfloat16 weights with PyTorch's AdamW, and with torchao's, which rounds weights up or
down at random, so that they move by their steps on average; also with its moments in 8 bits. Validation loss, nats a character,
before and after; the share of weights that have moved; bytes a parameter that host memory holds. And CPU nanoseconds of one core
that an optimizer's step takes a parameter, of a matrix of eight million: the least of five.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from characters import ALPHABET, characters
from gutenberg import config_for
from torch import nn
from torchao.optim import AdamW8bit, _AdamW
from transformers import LlamaForCausalLM

import hf_diffusionblocks as db

LENGTH, ROWS = 128, 16
SETTINGS = {"weight_decay": 0.0}


def torch_adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, fused=True, **SETTINGS)


def rounding(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return _AdamW(parameters, rate, bf16_stochastic_round=True, **SETTINGS)


def rounding_8_bit(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return AdamW8bit(parameters, rate, bf16_stochastic_round=True, **SETTINGS)


#: Name -> dtype of weights, the optimizer.
WAYS: dict[str, tuple[torch.dtype, Callable]] = {
    "float32": (torch.float32, torch_adamw),
    "bfloat16": (torch.bfloat16, torch_adamw),
    "bfloat16, stochastic rounding": (torch.bfloat16, rounding),
    "bfloat16, stochastic rounding, 8-bit moments": (torch.bfloat16, rounding_8_bit),
}


def rows_of(text: torch.Tensor, step: int) -> torch.Tensor:
    starts = torch.randint(len(text) - LENGTH, (ROWS,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()]).long()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def validation_loss(model: nn.Module, text: torch.Tensor) -> float:
    model.eval()
    losses = [loss_of(model, rows_of(text, step)).item() for step in range(10_000, 10_040)]
    model.train()
    return sum(losses) / len(losses)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: torch.Tensor, steps: range, schedule: bool) -> None:
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], len(steps)) if schedule else None
    for step in steps:
        loss_of(model, rows_of(text, step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rates is not None:
            rates.step()


def bytes_a_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Weights, gradients, and the optimizer's state."""
    state = (each for of in optimizer.state.values() for each in of.values() if torch.is_tensor(each))
    sizes = sum(_nbytes(each) for each in state) + 2 * sum(each.nbytes for each in model.parameters())
    return sizes / sum(each.numel() for each in model.parameters())


def _nbytes(tensor: torch.Tensor) -> int:
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return sum(_nbytes(getattr(tensor, name)) for name in names) if names else tensor.nbytes


def trained_on(model: nn.Module, way: str, rate: float, texts: dict[str, torch.Tensor], steps: range) -> dict[str, float]:
    dtype, make = WAYS[way]
    model = copy.deepcopy(model).to(dtype)
    db.stream_layers(model, "cpu")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make(model.parameters(), rate)
    torch.manual_seed(0)  # of rounding
    train(model, optimizer, texts["train"], steps, schedule=False)
    moved = sum(int((old != new).sum()) for old, new in zip(before, model.parameters()))
    return {
        "loss": validation_loss(model, texts["validation"]), "moved": moved / sum(each.numel() for each in before),
        "bytes_a_parameter": bytes_a_parameter(model, optimizer),
    }  # fmt: skip


def nanoseconds(way: str) -> float:
    """Of a parameter, in a step."""
    dtype, make = WAYS[way]
    parameter = nn.Parameter(torch.randn(2048, 4096, dtype=dtype))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer, times = make([parameter], 1e-5), []
    for _ in range(7):
        start = time.process_time()
        optimizer.step()
        times.append(time.process_time() - start)
    return min(times[2:]) / parameter.numel() * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=2, default=(1000, 400), help="before, and after")
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-5, 1e-4))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (work := Path("outputs")).mkdir(exist_ok=True)
    texts = torch.load(characters(options.data, work, 8_000_000, 500_000))
    model = LlamaForCausalLM(config_for("llama", 4, 128, len(ALPHABET), LENGTH)).train()
    first, more = options.steps
    train(model, torch_adamw(model.parameters(), 2e-3), texts["train"], range(first), schedule=True)
    found = {"steps": options.steps, "before": validation_loss(model, texts["validation"]), "after": {}}
    found["nanoseconds"] = {way: nanoseconds(way) for way in WAYS}
    for rate in options.rates:
        for way in WAYS:
            result = trained_on(model, way, rate, texts, range(first, first + more))
            found["after"].setdefault(f"{rate:g}", {})[way] = result
            print(f"{rate:g}, {way}: {result}", flush=True)
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
