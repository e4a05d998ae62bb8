"""Measures of `benchmarks/gpu.py`: what blocks cost beside the plain model, as ratios of runs side by side.

Models are in bfloat16 (weights, gradients, optimizer state; on a CPU in float32), and steps are the Trainer's: the stock
one's on the plain model, and ours, on the same batch. A step's seconds are the fastest of a few.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, TrainerCallback

import hf_diffusionblocks as db
from gpu_common import Clock, Machine, Row, check, fastest
from gpu_training import trainer_of
from hf_diffusionblocks.backbones.dit import DiTConfig
from hf_diffusionblocks.diffusion.objectives import chunked_cross_entropy
from hf_diffusionblocks.tasks import backbone_for

NUM_BLOCKS, MIB = 4, 2**20
WARM_UP, ROUNDS = 2, 3  #: rounds of steps in which every block moves once
OVER_FLOOR = 1.1  #: what a ratio may be of that of counted multiplications
WITHOUT_HEADS = {"local_head_layers": 0}
SCHEDULES = {
    "in turn": {"block_schedule": "random"},
    "together": {"block_schedule": "together"},
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def dtype_of(machine: Machine) -> torch.dtype:
    return torch.bfloat16 if machine.is_gpu else torch.float32


@dataclass(frozen=True)
class Size:
    """A text model, and what it trains on."""

    name: str
    config: PreTrainedConfig
    rows: int
    length: int

    def batch(self) -> dict[str, torch.Tensor]:
        tokens = torch.randint(self.config.vocab_size, (self.rows, self.length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "labels": tokens}

    def plain(self, machine: Machine) -> nn.Module:
        with machine.device:  # (a model of this size takes long to draw on a CPU)
            return backbone_for(self.config).make_plain(self.config).to(dtype_of(machine))

    def blocks(self, machine: Machine, **fields) -> db.DiffusionBlocksPreTrainedModel:
        with machine.device:
            return db.convert(self.config, NUM_BLOCKS, dtype=dtype_of(machine), **(fields or WITHOUT_HEADS))


FAMILIES = ("GPT-2", "Llama")


def size_of(family: str, machine: Machine) -> Size:
    """A real one on a GPU, elsewhere a tiny one."""
    if family == "GPT-2":
        if machine.is_gpu:
            return Size("GPT-2 small", GPT2Config(**NO_DROPOUT), 8, 1024)
        tiny = GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=512, n_positions=128, **NO_DROPOUT)
        return Size("tiny GPT-2", tiny, 2, 64)
    if machine.is_gpu:  # Llama-3.2-1B's sizes
        config = LlamaConfig(
            num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
            vocab_size=128256, max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        return Size("Llama of 1.2B", config, 4, 2048)
    tiny = LlamaConfig(
        num_hidden_layers=4, hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return Size("tiny Llama", tiny, 2, 64)


# ---- steps


@dataclass(frozen=True)
class Measured:
    """Of the steps in which every block moves once: seconds, and bytes at the peak (0 without a GPU)."""

    seconds: float
    peak: int


class Watch(TrainerCallback):
    """Clocks the steps after a warm-up, and notes how much of the device they take."""

    def __init__(self, machine: Machine, first_step: int):
        self.machine, self.first_step, self.clock = machine, first_step, Clock(machine)
        self.peak = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.first_step:
            return
        self.clock.mark()
        if state.global_step == self.first_step and self.machine.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.machine.device)
        elif state.global_step == state.max_steps and self.machine.is_gpu:
            self.peak = torch.cuda.max_memory_allocated(self.machine.device)


def measured(model: nn.Module, size: Size, machine: Machine, before: int, **arguments) -> Measured:
    """A run of the Trainer.

    Args:
        before: bytes that were on the device when there was no model yet.
    """
    in_turn = arguments.get("block_schedule") == "random"
    each = NUM_BLOCKS if in_turn else 1  # steps in which every block moves
    first, steps = WARM_UP * each, (WARM_UP + ROUNDS) * each
    watch = Watch(machine, first)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, size.batch(), Path(folder), machine.device, max_steps=steps, **arguments)
        trainer.add_callback(watch)
        trainer.train()
        blocks = [trainer.block_schedule.block_at(step) if in_turn else 0 for step in range(first, steps)]
    laps = watch.clock.laps()
    fastest_of = [min(lap for lap, block in zip(laps, blocks) if block == k) for k in sorted(set(blocks))]
    return Measured(sum(fastest_of), watch.peak - before if machine.is_gpu else 0)


def floor(schedule: str, size: Size, checkpointing: bool) -> float:
    """Time over an end-to-end step's, by multiplications a token: a backward pass counts as two forward ones."""
    config, architecture = size.config, backbone_for(size.config)
    with torch.device("meta"):
        plain = architecture.make_plain(config)
        layers = plain.get_submodule(architecture.layers_path(plain, architecture.num_layers(config)))
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.dim() > 1)
    layers = matrices + len(layers) * size.length * architecture.width(config)  # causal: scores and sums over half of them
    head, passes = config.vocab_size * architecture.width(config), 4 if checkpointing else 3
    again = {"in turn": (NUM_BLOCKS - 1) / 2, "together": 0}[schedule]
    return (passes * layers + 3 * NUM_BLOCKS * head + again * layers) / (passes * layers + 3 * head)


STEPS = {
    f"{family}{', checkpointing' if checkpointing else ''}": (family, checkpointing)
    for family in FAMILIES
    for checkpointing in (False, True)
}


@check("steps", over=STEPS)
def steps_beside_end_to_end(machine: Machine, name: str, subject: tuple[str, bool]) -> Iterator[Row]:
    """Every block's update over an end-to-end step, in time and at the peak of memory."""
    family, checkpointing = subject
    size, before = size_of(family, machine), machine.allocated()
    name = f"{size.name}{', checkpointing' if checkpointing else ''}"
    base = measured(size.plain(machine), size, machine, before, activation_checkpointing=checkpointing)
    peak = f", {base.peak / MIB:,.0f} MiB" if machine.is_gpu else ""
    yield Row(f"steps: {name}, end to end", f"{1000 * base.seconds:.1f} ms{peak}")
    for schedule, arguments in SCHEDULES.items():
        before = machine.allocated()
        found = measured(size.blocks(machine), size, machine, before, activation_checkpointing=checkpointing, **arguments)
        ratio, least = found.seconds / base.seconds, floor(schedule, size, checkpointing)
        said = f"{ratio:.2f}x, floor {least:.2f}x"
        if machine.is_gpu:
            said += f"; peak {found.peak / base.peak:.2f}x"
        allowed = f"{OVER_FLOOR * least:.2f}x" if machine.is_gpu else ""
        yield Row(f"steps: {name}, {schedule}", said, allowed, ratio <= OVER_FLOOR * least if machine.is_gpu else None)


# ---- inference


@check("decoding", over={family: family for family in FAMILIES})
def decoding_beside_plain(machine: Machine, name: str, subject: str) -> Iterator[Row]:
    """Tokens a second of greedy search with a cache, over the plain model's."""
    size, new_tokens = size_of(subject, machine), 64 if machine.is_gpu else 16
    models = {
        "plain": size.plain(machine).eval(),
        "recommended": size.blocks(machine).eval(),
        "paper, T=B": size.blocks(machine, preset="paper").eval(),
    }  # fmt: skip
    prompt = size.batch()["input_ids"][:1, :16].to(machine.device)

    def generate(model: nn.Module) -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    runs = {kind: lambda model=model: generate(model) for kind, model in models.items()}
    seconds = fastest(machine, runs, repetitions=3)
    for kind in list(models)[1:]:
        rate, of_plain = (new_tokens / seconds[each] for each in (kind, "plain"))
        said = f"{rate:.0f} tokens/s, {rate / of_plain:.2f}x of the plain model's"
        yield Row(f"decoding: {size.name}, {kind}", said)


@check("sampling images")
def sampling_beside_plain(machine: Machine) -> Iterator[Row]:
    """Seconds of Euler steps, over as many forward passes of the plain DiT."""
    layers, heads, pixels, images, steps = (12, 6, 32, 32, 12) if machine.is_gpu else (6, 2, 16, 4, 6)
    config = DiTConfig(num_layers=layers, num_attention_heads=heads, attention_head_dim=64, sample_size=pixels)  # (DiT-S/2)
    with machine.device:
        plain = backbone_for(config).make_plain(config).eval()
        labels, z = torch.zeros(images, dtype=torch.long), torch.randn(images, config.in_channels, pixels, pixels)
    models = {blocks: db.convert(plain, blocks, shared="per_block").eval() for blocks in (1, 3)}

    @torch.no_grad()
    def forward_passes() -> None:
        for step in range(steps):
            plain(z, torch.full((images,), float(step), device=machine.device), labels)

    runs = {"plain": forward_passes}
    runs |= {
        f"B={blocks}": lambda model=model: model.predict(labels, num_inference_steps=steps, noise=z)
        for blocks, model in models.items()
    }
    seconds = fastest(machine, runs, repetitions=3)
    for blocks in models:
        ratio = seconds[f"B={blocks}"] / seconds["plain"]
        said = f"{ratio:.2f}x, by layers {1 / blocks:.2f}x"
        yield Row(f"sampling images: B={blocks}, over the plain DiT's passes", said)


# ---- readout and loss


@check("readout")
def readout_beside_plain(machine: Machine) -> Iterator[Row]:
    """Final norm, head and loss, forward and backward, beside the plain ones; and how far the gradient is from float32's."""
    size = size_of("GPT-2", machine)
    if not machine.is_gpu:  # (of that, all but the head is what takes time)
        size = Size("small GPT-2", GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=8192, **NO_DROPOUT), 8, 128)
    batch = {name: tensor.to(machine.device) for name, tensor in size.batch().items()}
    model = size.blocks(machine).train()
    block, weight, norm = model.blocks[-1], model.backbone.lm_head.weight, model.backbone.transformer.ln_f
    dtype = dtype_of(machine)
    hidden = torch.randn(size.rows, size.length, size.config.n_embd, dtype=dtype, device=machine.device)
    targets = batch["labels"][:, 1:].flatten()

    def ours() -> torch.Tensor:
        rows = norm(hidden)[:, :-1].flatten(0, 1)
        with block.reading_out() as (head, parameters):
            return chunked_cross_entropy(head, [rows], targets, parameters, size.config.vocab_size) / len(targets)

    def plain_head(kind: torch.dtype) -> torch.Tensor:
        rows = norm(hidden)[:, :-1].flatten(0, 1)
        return F.cross_entropy(F.linear(rows.to(kind), weight.to(kind)).float(), targets)

    losses = {"ours": ours, "plain": lambda: plain_head(dtype)}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch's"] = lambda: F.linear_cross_entropy(norm(hidden)[:, :-1].flatten(0, 1), weight, targets)

    def gradient(loss) -> torch.Tensor:
        return torch.autograd.grad(loss(), weight)[0].float()

    seconds = fastest(machine, {name: lambda loss=loss: gradient(loss) for name, loss in losses.items()})
    exact = gradient(lambda: plain_head(torch.float32))
    errors = {name: ((gradient(loss) - exact).norm() / exact.norm()).item() for name, loss in losses.items()}
    for name in list(losses)[1:]:
        yield Row(f"readout: time over {name} head's", f"{seconds['ours'] / seconds[name]:.2f}x")
    allowed = 2 * max(errors["plain"], 1e-6)
    yield Row(
        "readout: gradient of the head, off float32's", f"{errors['ours']:.1e}, the plain head's {errors['plain']:.1e}",
        f"{allowed:.1e}", errors["ours"] <= allowed,
    )  # fmt: skip
