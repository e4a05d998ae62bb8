"""Checks of `benchmarks/gpu.py` that count bytes: what a step holds, by ledger, by estimate, and by the allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from transformers import GPT2Config

import hf_diffusionblocks as db
from gpu_common import Machine, Row, check
from hf_diffusionblocks.memory.ledger import measure_memory
from hf_diffusionblocks.memory.scenarios import steps
from hf_diffusionblocks.memory.ways import (
    Way, Workload, formulations_for, ways_of_blocks, ways_of_stock_models, ways_of_streams,
)  # fmt: skip

WITHIN = 0.05
NUM_BLOCKS, MIB = 4, 2**20
#: (Kernels of attention with dropout keep other things on a GPU than on the CPU, which is what the estimate follows.)
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def workload(is_gpu: bool) -> Workload:
    """GPT-2 small, 4 x 512 tokens, float32; or a tiny one."""
    if is_gpu:
        return Workload(GPT2Config(**NO_DROPOUT), NUM_BLOCKS, batch_size=4, sequence_length=512)
    tiny = GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=512, n_positions=64, **NO_DROPOUT)
    return Workload(tiny, NUM_BLOCKS, batch_size=4, sequence_length=64)


@cache
def estimated(is_gpu: bool) -> dict[str, int]:
    """Bytes at the peak, of each way; once for all of them."""
    case = workload(is_gpu)
    found = db.estimate_memory(case.config, NUM_BLOCKS, case.batch_size, case.sequence_length, dtype="fp32")
    return {name: ledger.total for name, ledger in found.ledgers.items()}


def start_libraries(machine: Machine) -> int:
    """Bytes of the workspaces that libraries keep once they have multiplied, in the forward and in the backward thread."""
    before = machine.allocated()
    layer = nn.Linear(64, 64).to(machine.device)
    layer(torch.ones(64, 64, device=machine.device)).sum().backward()
    del layer
    return machine.allocated() - before


def measured(way: Way, case: Workload, machine: Machine) -> tuple[int, int]:
    """Bytes of the largest step: by its ledger, and by the allocator beyond what was there before, workspaces included."""
    start_libraries(machine)
    before, found = machine.allocated(), []
    with machine.device:
        for step in steps(way, case):
            if step.stream:  # the order of its layers is known from the second pass on
                step.loss().backward()
                step.optimizer.zero_grad()
            gc.collect()  # what the making of the model has left
            ledger = measure_memory(step.model, step.optimizer, step.loss, kept=step.kept)
            found.append((ledger.total, (ledger.allocated or before) - before))
            del step  # before the next block's is made
    return max(found)


_BLOCKS = ways_of_blocks(workload(True).task, formulations_for(workload(True).task, GPT2Config()))
WAYS = {way.name: way for way in (*ways_of_stock_models(), *ways_of_streams(), *_BLOCKS)}


@check("memory", over=WAYS)
def memory_is_foretold(machine: Machine, name: str, subject: Way) -> Iterator[Row]:
    """Ledger and estimate, within 5 % of `torch.cuda.max_memory_allocated` (on the CPU, of one another)."""
    counted, allocated = measured(subject, workload(machine.is_gpu), machine)
    foretold = estimated(machine.is_gpu)[name]
    truth = allocated if machine.is_gpu else counted
    sizes = {"allocated": allocated, "ledger": counted, "estimate": foretold}
    said = ", ".join(f"{what} {size / MIB:,.0f}" for what, size in sizes.items() if size)
    worst = max(abs(counted / truth - 1), abs(foretold / truth - 1))
    yield Row(f"memory: {name}", f"{said} MiB: {worst:.1%}", f"{WITHIN:.0%}", worst <= WITHIN)


@check("memory: libraries", needs_gpu=True)
def library_workspaces(machine: Machine) -> Iterator[Row]:
    """What is not the step's, and is left out above."""
    torch._C._cuda_clearCublasWorkspaces()
    yield Row("memory: workspaces of libraries, left out above", f"{start_libraries(machine) / MIB:,.0f} MiB")
