"""block_schedule='together': what a step holds, block by block."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from families import watching
from process_scenarios import VIT, made
from together_runs import B, CARRIED, TOGETHER, source, trained
from transformers import TrainerCallback

from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.ways import Way, Workload


class Watch(TrainerCallback):
    """Notes whose gradients are there as a block moves."""

    def __init__(self, model):
        self.model, self.owners = model, []

    def on_optimizer_step(self, *args, **kwargs):
        named = self.model.named_parameters()
        self.owners.append({self.model.block_of_parameter(name) for name, p in named if p.grad is not None})


def test_blocks_move_one_by_one_and_then_what_they_share(source, tmp_path):
    model = made(source, CARRIED)
    watch = Watch(model)
    trained(model, source, tmp_path, {**TOGETHER, "max_steps": 2}, watch)
    assert watch.owners == 2 * [*({k} for k in range(B)), {None}]


def test_the_ledger_counts_gradients_and_activations_of_one_block(source, tmp_path):
    model = made(source, CARRIED)
    trainer = trained(model, source, tmp_path, TOGETHER)
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    shared = sum(p.nbytes for p in model.shared_parameters())
    plain = trained(made(source, {**CARRIED, "num_blocks": 1}), source, tmp_path, {"max_steps": 2}).ledgers[0].parts
    kept = B * 2 * (12 if source is not VIT else 5) * 32 * 4  # what enters each block, at most
    for k, ledger in trainer.ledgers.items():
        assert ledger.parts.gradients <= sizes[k] + shared
        assert ledger.parts.activations < plain.activations / 2 + kept
    assert plain.gradients == sum(sizes) + shared


def test_the_estimate_s_ledger_is_the_trainer_s(source, tmp_path):
    fields = {name: value for name, value in CARRIED.items() if name != "num_blocks"}
    way = Way("together", fields, together=True)
    expected = ledger_of(way, Workload(source, B, batch_size=2, sequence_length=None if source is VIT else 12))
    ledgers = trained(made(source, CARRIED), source, tmp_path, TOGETHER).ledgers.values()
    assert max(ledger.total for ledger in ledgers) == pytest.approx(expected.total, rel=0.02)


def test_layers_run_once_a_batch(source, tmp_path):
    model = made(source, CARRIED)
    with ExitStack() as stack:
        runs = [stack.enter_context(watching(layer)) for layer in model.layers]
        trained(model, source, tmp_path, {**TOGETHER, "max_steps": 3, "gradient_accumulation_steps": 2})
        assert [len(entered) for entered in runs] == [3 * 2] * B
