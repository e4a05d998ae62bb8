"""The ledger: what is counted, against what is known of a step."""

from __future__ import annotations

import weakref
from dataclasses import asdict

import pytest
import torch
from process_scenarios import CARRIED, LLAMA, VIT, made, trainer_of, GPT2 as TRAINED
from saved_activations import SavedActivations
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.memory.ledger import PARTS, Ledger, Parts, state_tensors
from hf_diffusionblocks.diffusion import objectives
from hf_diffusionblocks.diffusion.objectives import rows_per_chunk
from hf_diffusionblocks.memory.scenarios import ledger_of, steps
from hf_diffusionblocks.memory.ways import Way, Workload, formulations_for, ways_of_blocks, ways_of_stock_models
from hf_diffusionblocks.memory.without_memory import WithoutMemory
from hf_diffusionblocks.tasks import TASKS

GPT2 = GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=307, n_positions=32, bos_token_id=0, eos_token_id=0)
WIDER = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 307, "max_position_embeddings": 32})
CONFIGS = {"gpt2": (GPT2, 24), "llama": (WIDER, 24), "vit": (VIT, None)}
FORMULATIONS = formulations_for(TASKS["text-generation"], GPT2Config())
WAYS = {way.name: way for way in ways_of_stock_models() + ways_of_blocks(TASKS["text-generation"], FORMULATIONS)}


def workload(family: str) -> Workload:
    config, length = CONFIGS[family]
    return Workload(config, num_blocks=4, batch_size=3, sequence_length=length)


class Product(nn.Module):
    """One matrix, and a tensor between."""

    def __init__(self):
        super().__init__()
        self.config = GPT2
        self.weight = nn.Parameter(torch.ones(100, 100))

    def forward(self, inputs):
        return (inputs @ self.weight).square().sum()


def test_every_storage_of_a_small_step_is_counted_once():
    """inputs @ weight is 100 x 100, and saved for the square's backward, as inputs are for the product's."""
    model, inputs = Product(), torch.ones(100, 100)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ledger = db.measure_memory(model, optimizer, lambda: model(inputs))
    matrix = 4 * 100 * 100
    expected = {"shared": matrix, "gradients": matrix, "optimizer": 2 * matrix + 4, "activations": 2 * matrix}
    assert asdict(ledger.parts) == dict.fromkeys(PARTS, 0) | expected
    # In the square's backward: these but the weight's gradient, which is made later, and some of 2, 2x and 2x times it.
    certain = ledger.parts.total - matrix
    assert ledger.total == sum(asdict(ledger.peak).values())
    assert matrix <= ledger.total - certain == ledger.peak.rest <= 3 * matrix + 100
    assert ledger.peak.gradients == 0


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_parts_are_those_counted_one_by_one(family, name):
    """Parameters, gradients and state by their own sizes; activations as saved hooks see them."""
    way, sizes = WAYS[name], workload(family)
    for model, optimizer, loss, kept, _ in steps(way, sizes):
        torch.manual_seed(0)
        with db.StepMemory(model, optimizer, kept=kept) as memory:
            loss().backward()
        gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
        optimizer.step()
        parts = memory.ledger().parts
        optimizer.zero_grad()
        torch.manual_seed(0)
        with SavedActivations(model.parameters()) as saved:
            graph = loss()
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        assert parts.shared + parts.blocks + parts.adaln == sum(held.values())
        assert parts.gradients == gradients
        assert parts.optimizer == sum(tensor.nbytes for tensor in state_tensors(optimizer))
        # A chunk of the readout, and what checkpointing computes again, come and go.
        assert saved.bytes <= parts.activations + parts.logits
        if not way.checkpointing:
            rows = sizes.batch_size * (sizes.sequence_length or 1)
            chunk = rows_per_chunk(rows, 307, torch.device("cpu")) * 4 * (8 * 32 + 307)
            # (What embeds keeps its input until the forward pass ends, also where earlier blocks then let go what comes of it.)
            inputs = sum(tensor.nbytes for tensor in sizes.batch().values())
            assert parts.activations <= saved.bytes + sum(hidden.nbytes for hidden in kept) + inputs + chunk
        del graph


def test_what_no_gradient_is_asked_of_is_gone():
    model = GPT2LMHeadModel(GPT2)
    with db.StepMemory(model, torch.optim.SGD(model.parameters())):
        unused = weakref.ref(model(torch.zeros((1, 4), dtype=torch.long)).logits.softmax(-1))
    assert unused() is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_those_of_a_chunk(family, monkeypatch):
    monkeypatch.setattr(objectives, "WHOLE", 0)
    parts = ledger_of(WAYS["recommended: job, shared part frozen, around the earlier blocks"], workload(family)).parts
    one = rows_per_chunk(3 * 23, 307, torch.device("cpu")) * 307 * 4
    assert one <= parts.logits <= 4 * one < 3 * 23 * 307 * 4 * 2


def test_shared_part_blocks_and_adaln_are_listed_apart():
    model = db.convert(GPT2, 2, preset="paper")
    ledger = ledger_of(Way("paper", {"preset": "paper"}), Workload(GPT2, 2, 3, 24))
    sizes = {"shared": 0, "blocks": 0, "adaln": 0}
    for name, parameter in model.named_parameters():
        part = "adaln" if "modulations" in name or "sigma_emb" in name else "blocks" if ".h." in name else "shared"
        sizes[part] += parameter.nbytes
    assert {part: getattr(ledger.parts, part) for part in sizes} == sizes


def test_a_ledger_prints_parts_and_sums():
    ledger = Ledger(Parts(shared=2**20, logits=3 * 2**20), Parts(shared=2**20, rest=2**19), allocated=2**21)
    lines = str(ledger).splitlines()
    assert lines[0].split() == ["MiB", "at", "its", "largest", "at", "the", "peak"]
    assert [line.split()[0] for line in lines[1:]] == [*PARTS, "total", "torch.cuda.max_memory_allocated"]
    assert lines[10].split() == ["total", "4.0", "1.5"]
    assert lines[-1].split()[-1] == "2.0"


def test_the_head_has_one_gradient():
    """The readout's chunks leave theirs in what becomes `.grad`: at the peak, one more is there at most (a chunk's)."""
    way = WAYS["recommended: job, own embeddings and head, around the earlier blocks"]
    config = LlamaConfig(num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=30011)
    peak = ledger_of(way, Workload(config, 4, 1, 24)).peak
    head = 30011 * 32 * 4
    assert peak.gradients + peak.rest < 2.2 * head


OPERATIONS = {
    "number": lambda x: x.long() + 1, "fraction": lambda x: x.long() + 1.0, "truth": lambda x: x.bool() + True,
    "product": lambda x: x[None] @ x.T, "view": lambda x: x.view(1, 4, 6), "slice": lambda x: x[1:, ::2],
    "product's view": lambda x: torch.ops.aten._unsafe_view(x, [1, 4, 6]), "expanded": lambda x: x[:1].expand(3, 6),
    "copy": lambda x: x.clone(), "columns": lambda x: x.T.clone(), "cast": lambda x: x.bfloat16(), "zeros": torch.zeros_like,
    "sum": lambda x: x.sum(0, keepdim=True), "parts": lambda x: torch.cat(x.split(2)),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_what_is_followed_looks_as_pytorch_s_fake_tensors_do(operation):
    """Also the second time, when it is known what comes of it; whatever else it was called with before."""
    fake_mode = FakeTensorMode()
    for x in (torch.ones(4, 6), torch.ones(6, 4).T):
        fake = fake_mode.from_tensor(x)
        expected = operation(fake)
        for _ in range(2):
            with WithoutMemory(fake_mode):
                found = operation(fake)
            for look in (torch.Tensor.size, torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.type):
                assert look(found) == look(expected)
            storages = [each.untyped_storage() for each in (found, expected, fake)]
            assert storages[0].nbytes() == storages[1].nbytes()
            assert len({each._cdata for each in storages}) == (1 if storages[1]._cdata == storages[2]._cdata else 3)


# ---- in the Trainer


def test_the_trainer_keeps_a_ledger_of_each_block(tmp_path):
    model = made(TRAINED, CARRIED)
    arguments = {"max_steps": 6, "gradient_accumulation_steps": 2, "block_schedule": "random"}
    trainer = trainer_of(model, TRAINED, tmp_path, arguments)
    trainer.train()
    assert sorted(trainer.ledgers) == [0, 1]
    shared = sum(p.nbytes for p in model.shared_parameters())
    for block, ledger in trainer.ledgers.items():
        own = sum(p.nbytes for p in model.block_parameters(block))
        # Block 1 does not reach the position embeddings: its input comes without gradient.
        unreached = 0 if block == 0 else model.backbone.transformer.wpe.weight.nbytes
        assert ledger.parts.gradients == own + shared - unreached
        assert ledger.parts.blocks == sum(p.nbytes for k in range(2) for p in model.block_parameters(k))
        assert ledger.parts.activations > 0 and ledger.total > 0


def test_the_trainer_prints_the_largest_ledger(tmp_path, caplog):
    logging.get_logger("hf_diffusionblocks").propagate = True
    with caplog.at_level("INFO", logger="hf_diffusionblocks"):
        trainer = trainer_of(made(TRAINED, CARRIED), TRAINED, tmp_path, {})
        trainer.train()
    largest = max(trainer.ledgers.values(), key=lambda ledger: ledger.total)
    assert str(largest) in caplog.text
