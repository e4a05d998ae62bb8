"""Checks of `benchmarks/gpu.py` that run a model's passes: the same on every device, and in every implementation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

import hf_diffusionblocks as db
from gpu_common import BERT, FAMILIES, GPT2, LLAMA, LOCAL, VIT, Family, Machine, Row, check, equal, within
from hf_diffusionblocks.diffusion.randomness import noise_of_positions, noise_of_rows

CPU = torch.device("cpu")
FLOAT32 = 1e-4  #: what sums in another order may add up to
Passes = list[torch.Tensor]


def passes(family: Family, device: torch.device, dtype: torch.dtype = torch.float32, **fields) -> Passes:
    """Of every block: its loss, what it says of the target, and its gradients, as one tensor each; on the CPU."""
    model = family.model(**fields).to(device, dtype).train()
    return [tensor for block in range(model.num_blocks) for tensor in passes_of(model, family, block)]


def passes_of(model: db.DiffusionBlocksPreTrainedModel, family: Family, block: int) -> Passes:
    batch = family.batch()
    noise = family.noise(model, block, batch)
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() and name in batch else None)
        if torch.is_tensor(value) else value
        for name, value in (batch | noise).items()
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)  # of what is not given
    model.zero_grad()
    output = model(**inputs, block_index=block, generator=generator, return_logits=True)
    output.loss.backward()
    said = output.logits if "logits" in output else output.estimate
    said = said.masked_fill(said == -torch.inf, 0)  # (of what cannot be said; its error would be no number, which is not found)
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (output.loss, said, torch.cat(gradients))]


def error(found: Passes, expected: Passes) -> float:
    """The largest of the tensors' errors, each over the tensor's own size."""
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True))


# ---- devices


@check("float32", over=FAMILIES)
def float32_agrees(machine: Machine, name: str, subject: Family) -> Iterator[Row]:
    """Losses, what is said of the target, and gradients, with the CPU's."""
    found = error(passes(subject, machine.device), passes(subject, CPU))
    yield within(f"float32: {name}, beside the CPU", found, FLOAT32)


@check("bfloat16", over=FAMILIES)
def bfloat16_agrees(machine: Machine, name: str, subject: Family) -> Iterator[Row]:
    """With the CPU's float32, but for twice the error that bfloat16 has there."""
    exact = passes(subject, CPU)
    here, there = (error(passes(subject, device, torch.bfloat16), exact) for device in (CPU, machine.device))
    yield within(f"bfloat16: {name}", there, 2 * here)


@check("evaluation noise")
def evaluation_noise(machine: Machine) -> Iterator[Row]:
    """Keyed noise is drawn alike everywhere."""
    positions, devices = torch.arange(100), (CPU, machine.device)
    for name, (here, there) in {
        "of a walk of images": [noise_of_rows(3, 50, 0, None, device) for device in devices],
        "of a walk of tokens": [noise_of_positions(positions.to(device), 50, 0) for device in devices],
    }.items():
        yield equal(f"evaluation noise {name}", torch.equal(here, there.cpu()))


@check("evaluation", over=FAMILIES)
def evaluations_agree(machine: Machine, name: str, subject: Family) -> Iterator[Row]:
    """With the CPU's, whose noise they share."""
    here, there = ([evaluation_loss(subject, device)] for device in (CPU, machine.device))
    yield within(f"evaluation: {name}, its loss", error(there, here), 1e-3)


def evaluation_loss(family: Family, device: torch.device) -> torch.Tensor:
    model = family.model().to(device).eval()
    batch = {name: tensor.to(device) for name, tensor in family.batch().items()}
    if family.task.name == "fill-mask":  # what is masked is the caller's
        batch["input_ids"] = batch["input_ids"].index_fill(1, torch.arange(0, 32, 3, device=device), model.mask_token_id)
    with torch.no_grad():
        return model(**batch).loss.cpu()


# ---- implementations

#: (The paper's refuses all but sdpa and eager, and says why.)
ATTENTIVE = {
    "llama, recommended": (Family(LLAMA, LOCAL), ("sdpa", "flex_attention")),
    "gpt2, recommended": (Family(GPT2, LOCAL), ("sdpa", "flex_attention")),
    "vit, recommended": (Family(VIT, LOCAL), ("sdpa", "flex_attention")),
    "bert, masked": (Family(BERT, {"num_blocks": 2}), ("sdpa", "flex_attention")),
    "llama, paper": (FAMILIES["llama, paper"], ("sdpa",)),
}


@check("attention", over=ATTENTIVE)
def attentions_agree(machine: Machine, name: str, subject: tuple[Family, tuple[str, ...]]) -> Iterator[Row]:
    """With eager attention, in float32."""
    family, kinds = subject
    expected = passes(family, machine.device, attn_implementation="eager")
    for kind in kinds:
        if kind == "flex_attention" and not machine.is_gpu:
            yield Row(f"attention: {name}, {kind}", "needs a GPU")  # its backward pass does
            continue
        found = passes(family, machine.device, attn_implementation=kind)
        yield within(f"attention: {name}, {kind} beside eager", error(found, expected), FLOAT32)


@check("flash attention", needs_gpu=True)
def flash_agrees(machine: Machine) -> Iterator[Row]:
    """In bfloat16, but for twice the error of PyTorch's plain kernel."""
    family = Family(LLAMA, LOCAL)
    exact = passes(family, machine.device)
    with sdpa_kernel(SDPBackend.MATH):
        allowed = 2 * error(passes(family, machine.device, torch.bfloat16), exact)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or nothing: it raises where this one cannot run
        yield within("flash attention, PyTorch's", error(passes(family, machine.device, torch.bfloat16), exact), allowed)
    if not is_flash_attn_2_available():
        yield Row("flash attention, flash_attn's", "not installed")
        return
    found = passes(family, machine.device, torch.bfloat16, attn_implementation="flash_attention_2")
    yield within("flash attention, flash_attn's", error(found, exact), allowed)


COMPILED = {name: FAMILIES[name] for name in ("llama, recommended", "vit, paper", "dit")}


@check("torch.compile", over=COMPILED)
def compiled_agrees(machine: Machine, name: str, subject: Family) -> Iterator[Row]:
    """Compiled layers, with the others. (Where there is no GPU, by a backend that writes no kernels.)"""
    backend = "inductor" if machine.is_gpu else "aot_eager"
    model = subject.model().to(machine.device).train()
    model.compile_layers(backend=backend)
    found = [tensor for block in range(model.num_blocks) for tensor in passes_of(model, subject, block)]
    yield within(f"torch.compile ({backend}): {name}", error(found, passes(subject, machine.device)), FLOAT32)
