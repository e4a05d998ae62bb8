"""What the checks of a GPU share: rows of the table, the registry, the machine, clocks, and models of every family."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig
from hf_diffusionblocks.recurrent_depth_llama import RecurrentDepthLlamaConfig
from hf_diffusionblocks.tasks import Task, task_of

# Before CUDA starts: deterministic products, where these are asked for; and one GPU of those that may be used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


# ---- the table


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        check: what was looked at.
        result: what was found.
        allowed: what it may be.
        holds: whether it is; None for a measure, which has no limit, or for what this machine cannot tell.
    """

    check: str
    result: str
    allowed: str = ""
    holds: bool | None = None


def equal(name: str, is_equal: bool) -> Row:
    """Of two results that have to be."""
    return Row(name, "equal" if is_equal else "differ", "equal bit for bit", is_equal)


def within(name: str, found: float, allowed: float) -> Row:
    """An error that may be no larger."""
    return Row(name, f"{found:.1e}", f"{allowed:.1e}", found <= allowed)


@dataclass(frozen=True)
class Machine:
    """Where the checks run. Without a GPU they run on the CPU, in small."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes, once what nobody refers to any more is gone."""
        gc.collect()
        if not self.is_gpu:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)


@dataclass(frozen=True)
class Check:
    """An entry of the registry: `run` gives rows, and may raise, which is a row, too."""

    name: str
    run: Callable[[Machine], Iterator[Row]]
    needs_gpu: bool


CHECKS: list[Check] = []  #: in the order in which they run


def check(name: str, needs_gpu: bool = False, over: Mapping[str, Any] | None = None) -> Callable:
    """Register a function `(machine) -> rows`; or (`over`) `(machine, name, subject) -> rows`, as a check for each of them:
    what one raises does not stop the others."""

    def register(run: Callable[..., Iterator[Row]]):
        if over is None:
            CHECKS.append(Check(name, run, needs_gpu))
        for key, value in (over or {}).items():
            CHECKS.append(Check(f"{name}: {key}", partial(run, name=key, subject=value), needs_gpu))
        return run

    return register


# ---- clocks


class Clock:
    """Seconds between marks: as the device's stream comes to them; or of CPU time, whatever else the machine does."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self._marks: list = []

    def mark(self) -> None:
        if not self.machine.is_gpu:
            self._marks.append(time.process_time())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def laps(self) -> list[float]:
        """From each mark to the next."""
        self.machine.wait()
        pairs = zip(self._marks, self._marks[1:])
        if self.machine.is_gpu:
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]


def fastest(machine: Machine, runs: Mapping[str, Callable[[], object]], repetitions: int = 5) -> dict[str, float]:
    """Seconds of each run, at the fastest of interleaved repetitions, after one that warms up."""
    clocks = {name: Clock(machine) for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            clocks[name].mark()
            run()
            clocks[name].mark()
    return {name: min(clock.laps()[2::2]) for name, clock in clocks.items()}


@contextmanager
def deterministic() -> Iterator[None]:
    """The same sums each time, where PyTorch has them; a warning where it has not (so attention is by its plain kernel)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- models of every family


@dataclass(frozen=True)
class Family:
    """A small model, and a batch to train it on.

    Args:
        config: of the plain model.
        fields: of `convert`.
    """

    config: PreTrainedConfig
    fields: dict = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return task_of(self.config, self.fields.get("task"))

    def model(self, **fields) -> db.DiffusionBlocksPreTrainedModel:
        """On the CPU, the same each time; every parameter away from its start, where some say nothing (AdaLN's zeros)."""
        torch.manual_seed(0)
        model = db.convert(self.config, **{**self.fields, **fields})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return model

    def batch(self, rows: int = 4) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        return self.task.example(self.config, rows, 32 if self.task.takes_sequence_length else None)

    def noise(self, model: db.DiffusionBlocksPreTrainedModel, block: int, batch: dict) -> dict[str, torch.Tensor | float]:
        """What `forward` would draw: devices draw differently."""
        if self.task.name == "fill-mask":  # which tokens, a generator says, of the CPU on every device
            return {"mask_ratio": 0.5}
        if model.noise_schedule is None:  # the recommended blocks have none
            return {}
        low, high = model.noise_schedule.interval(block)
        first = next(iter(batch.values()))
        shapes = {
            "text-generation": (len(first), first.shape[-1] - 1, model.config.hidden_size),
            "image-classification": (len(first), model.config.hidden_size),
            "image-generation": tuple(first.shape),
        }
        noise = torch.randn(shapes[self.task.name], generator=torch.Generator().manual_seed(2))
        return {"sigma": torch.full((len(first),), (low * high) ** 0.5), "noise": noise}


WIDTH = 64
_LLAMA = dict(
    num_hidden_layers=4, hidden_size=WIDTH, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
GPT2 = GPT2Config(
    n_layer=4, n_embd=WIDTH, n_head=4, vocab_size=256, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
LLAMA, QWEN3 = LlamaConfig(**_LLAMA), Qwen3Config(head_dim=16, **_LLAMA)
RECURRENT = RecurrentDepthLlamaConfig(
    num_prelude_layers=1, num_core_layers=2, num_coda_layers=1, mean_recurrence=4,
    **{name: value for name, value in _LLAMA.items() if name != "num_hidden_layers"},
)  # fmt: skip
BERT = BertConfig(
    vocab_size=256, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
VIT = ViTConfig(
    num_hidden_layers=4, hidden_size=WIDTH, intermediate_size=128, num_attention_heads=4, image_size=16, patch_size=4,
    num_channels=3, num_labels=10,
)  # fmt: skip
DIT = DiTConfig(
    num_layers=4, num_attention_heads=4, attention_head_dim=16, in_channels=4, sample_size=16, patch_size=2,
    num_embeds_ada_norm=10,
)  # fmt: skip
_TWO = {"num_blocks": 2}
LOCAL, PAPER = ({**_TWO, "preset": preset} for preset in ("recommended", "paper"))
_KNOWN_TARGETS = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "vit": VIT}
FAMILIES = {
    **{f"{name}, recommended": Family(config, LOCAL) for name, config in _KNOWN_TARGETS.items()},
    **{f"{name}, paper": Family(config, PAPER) for name, config in _KNOWN_TARGETS.items()},
    "dit": Family(DIT, {**_TWO, "shared": "per_block"}),
    "bert, masked": Family(BERT, _TWO),
    "llama, masked": Family(LLAMA, {**_TWO, "task": "fill-mask"}),
    "recurrent depth": Family(RECURRENT),
}
