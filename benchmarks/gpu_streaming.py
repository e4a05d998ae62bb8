"""Checks of `benchmarks/gpu.py` for streamed layers: exact on the device, and how fast, beside what else trains a model that
does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_diffusionblocks as db
from gpu_common import Clock, Machine, Row, check, deterministic, equal, within
from zero3 import process_group, zero3_with_offload

VOCABULARY = 512
EXACT = {
    "llama": partial(LlamaForCausalLM, LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        bos_token_id=0, eos_token_id=0,
    )),
    "llama, tied": partial(LlamaForCausalLM, LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )),
    "gpt2": partial(GPT2LMHeadModel, GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
    )),
    "bert": partial(BertForMaskedLM, BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
    )),
}  # fmt: skip


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def tokens(rows: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """After two micro-batches, the second with all copies ahead."""
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(**tokens(4, 32, device)).loss
        loss.backward()
    return [parameter.grad.cpu() for parameter in model.parameters()]


@check("streamed gradients", over=EXACT)
def gradients_agree(machine: Machine, name: str, subject: Callable[[], nn.Module]) -> Iterator[Row]:
    """With those of the stock model on the same device; and that two units were there at most."""
    with deterministic():
        for dtype in (None, torch.bfloat16):
            expected = gradients(made(subject).to(machine.device), machine.device, dtype)
            model = made(subject)
            stream = db.stream_layers(model, machine.device)
            found = gradients(model, machine.device, dtype)
            label = f"streamed gradients: {name}, {'float32' if dtype is None else 'bfloat16 autocast'}"
            yield equal(label, all(map(torch.equal, found, expected)))
            yield Row(f"{label}, units at once", str(stream.peak_units), "2", stream.peak_units <= 2)


# ---- speed

#: Rows and tokens of a micro-batch.
LOADS = {"1 x 2048": (1, 2048), "8 x 1024": (8, 1024), "32 x 1024": (32, 1024)}


def large(machine: Machine) -> nn.Module:
    """A Llama of 1.1 billion parameters in bfloat16; or a tiny one."""
    sizes = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
    if not machine.is_gpu:
        sizes = dict(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0)
    return made(partial(LlamaForCausalLM, config)).to(torch.bfloat16 if machine.is_gpu else torch.float32)


def streamed(machine: Machine, keep: int = 0) -> tuple[nn.Module, Callable[[], None]]:
    model = large(machine)
    db.stream_layers(model, machine.device, keep=keep)
    return model, _stepping(model)


def checkpointed(machine: Machine) -> tuple[nn.Module, Callable[[], None]]:
    model = large(machine).to(machine.device)
    return model, _stepping(model)


def stepping_in_backward(machine: Machine) -> tuple[nn.Module, Callable[[], None]]:
    """An optimizer a parameter, which steps as soon as its gradient is there."""
    model = large(machine).to(machine.device)
    for parameter in model.parameters():
        optimizer = torch.optim.AdamW([parameter], lr=1e-5, fused=True)

        def step(_, optimizer=optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return model, lambda: None


def fsdp2_with_offload(machine: Machine) -> tuple[nn.Module, Callable[[], None]]:
    """PyTorch's own: each layer, embedding and head is gathered from host memory when it is used; in one process."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = torch.distributed.init_device_mesh(machine.device.type, (1,))
    model = large(machine)
    for part in (*model.model.layers, model.model.embed_tokens, model.lm_head, model):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy())
    return model, _stepping(model)


def deepspeed_with_offload(machine: Machine) -> tuple[nn.Module, Callable[[], None]]:
    return zero3_with_offload(large(machine), pinned=machine.is_gpu, bf16={"enabled": machine.is_gpu})


def _stepping(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


WAYS = {"plain, checkpointing": checkpointed, "optimizer in the backward pass": stepping_in_backward, "streamed": streamed}


@check("streamed speed", over=WAYS)
def speed(machine: Machine, name: str, subject: Callable) -> Iterator[Row]:
    """Seconds of a micro-batch and of the optimizer's step, tokens a second, and what was on the device."""
    model, step = subject(machine)
    for load, (rows, length) in LOADS.items():
        rows, length = (rows, length) if machine.is_gpu else (rows, 64)
        try:
            batch, update, peak = seconds(machine, model, step, tokens(rows, length, machine.device))
        except torch.cuda.OutOfMemoryError:
            yield Row(f"streamed speed: {name}, {load}", "out of memory")
            continue
        said = f"{batch:.3f} s a micro-batch, {update:.3f} s a step, {rows * length / (batch + update):,.0f} tokens/s"
        yield Row(f"streamed speed: {name}, {load}", f"{said}, {peak / 2**30:.2f} GiB")


@check("streamed speed: FSDP2", needs_gpu=True)  # (it has no way to the host where the host is the device)
def speed_of_fsdp2(machine: Machine) -> Iterator[Row]:
    """The same, of PyTorch's own."""
    with process_group():
        yield from speed(machine, "FSDP2 with offload, one process", fsdp2_with_offload)


@check("streamed speed: DeepSpeed")
def speed_of_deepspeed(machine: Machine) -> Iterator[Row]:
    """The same, of DeepSpeed's, if it is installed."""
    if find_spec("deepspeed") is None:
        yield Row("streamed speed: DeepSpeed", "is not installed")
        return
    with process_group():
        yield from speed(machine, "DeepSpeed ZeRO-3 with offload, one process", deepspeed_with_offload)


@check("streamed copies, hidden")
def share_hidden(machine: Machine) -> Iterator[Row]:
    """Of the seconds that copies take by themselves, what does not show: beside the same model whose layers all stay."""
    rows, length = (8, 1024) if machine.is_gpu else (4, 64)
    found, copied = {}, 0
    for keep in (0, large(machine).config.num_hidden_layers):
        model, step = streamed(machine, keep)
        batch = tokens(rows, length, machine.device)
        found[keep], _, _ = seconds(machine, model, model.zero_grad, batch)  # (sums in host memory would hide copies, too)
        before = model._stream.copied
        model(**batch).loss.backward()
        moved = {way: model._stream.copied[way] - before[way] for way in before}
        copied = copied or moved["to_device"]
        del model, step
    alone = copied / bandwidth(machine)
    shown = max(0.0, found[0] - min(found.values()))
    holds = shown <= 0.2 * alone if machine.is_gpu else None
    yield Row("streamed copies, hidden", f"{1 - min(1.0, shown / alone):.0%} of {alone:.3f} s", "80%", holds)


def bandwidth(machine: Machine) -> float:
    """Bytes a second, from pinned host memory."""
    host = torch.empty(2**28 if machine.is_gpu else 2**24, dtype=torch.uint8, pin_memory=machine.is_gpu)
    clock = Clock(machine)
    for _ in range(4):
        clock.mark()
        host.to(machine.device, copy=True)
    clock.mark()
    return host.nbytes / min(clock.laps()[1:])


def seconds(machine: Machine, model: nn.Module, step: Callable[[], None], batch: dict) -> tuple[float, float, int]:
    """Of a micro-batch and of a step, at the median of four after one; and bytes on the device at the most."""
    clock = Clock(machine)
    machine.allocated()
    if machine.is_gpu:
        torch.cuda.reset_peak_memory_stats(machine.device)
    for _ in range(5):
        clock.mark()
        model(**batch).loss.backward()
        machine.wait()
        clock.mark()
        step()
        machine.wait()
    clock.mark()
    laps = clock.laps()
    peak = torch.cuda.max_memory_allocated(machine.device) if machine.is_gpu else 0
    return sorted(laps[2::2])[1], sorted(laps[3::2])[1], peak


# ---- the loss in parts


@check("loss in parts")
def loss_in_parts(machine: Machine) -> Iterator[Row]:
    """Beside the whole logits, in float32."""
    from hf_diffusionblocks.streaming import loss

    subject, found, before = EXACT["llama"], {}, loss.PART_BYTES
    for parts in (before, 2**14):
        loss.PART_BYTES = parts
        model = made(subject)
        db.stream_layers(model, machine.device)
        found[parts] = gradients(model, machine.device, None)
    loss.PART_BYTES = before
    worst = max(((one - other).norm() / other.norm()).item() for one, other in zip(found[2**14], found[before]))
    yield within("loss in parts, gradients", worst, 1e-5)
