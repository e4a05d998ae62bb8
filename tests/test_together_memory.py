"""block_schedule='together': what a step holds on the device, and what crosses to it."""

from __future__ import annotations

from collections import Counter

import pytest
from process_scenarios import GPT2, VIT, made
from together_runs import B, CARRIED, EXACT, assert_same, objective, source, trained
from transformers import TrainerCallback

from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.traffic import traffic
from hf_diffusionblocks.memory.ways import Way, Workload


class Watch(TrainerCallback):
    """Notes whose gradients are there, and what blocks have on the device, as a block moves."""

    def __init__(self, model):
        self.model, self.owners, self.on_device = model, [], []

    def on_optimizer_step(self, *args, **kwargs):
        named = self.model.named_parameters()
        self.owners.append({self.model.block_of_parameter(name) for name, p in named if p.grad is not None})
        if self.model.offload is not None:
            self.on_device.append(self.model.offload.bytes_on_device())


def test_blocks_move_one_by_one_and_then_what_they_share(source, objective, tmp_path):
    model = made(source, CARRIED)
    watch = Watch(model)
    trained(model, source, tmp_path, {**objective, "max_steps": 2}, watch)
    order = [{k} for k in range(B)]
    assert watch.owners == 2 * [*(reversed(order) if objective is EXACT else order), {None}]


def test_the_ledger_counts_gradients_and_activations_of_one_block(source, objective, tmp_path):
    """And, where others are in host memory, optimizer state of one."""
    model = made(source, CARRIED)
    trainer = trained(model, source, tmp_path, {**objective, "offload_inactive_blocks": "cpu"}, watch := Watch(model))
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    shared = sum(p.nbytes for p in model.shared_parameters())
    plain = trained(made(source, {**CARRIED, "num_blocks": 1}), source, tmp_path, {"max_steps": 2}).ledgers[0].parts
    kept = B * 2 * (12 if source is not VIT else 5) * 32 * 4  # what enters each block, at most
    for k, ledger in trainer.ledgers.items():
        assert ledger.parts.gradients <= sizes[k] + shared
        assert ledger.parts.optimizer <= 2 * (sizes[k] + shared) + 1000
        assert ledger.parts.activations < plain.activations / 2 + kept
    assert plain.gradients == sum(sizes) + shared
    assert all(held["parameters"] <= 2 * max(sizes) for held in watch.on_device)
    assert model.offload.bytes_on_device() == {"parameters": 0, "optimizer": 0}


@pytest.mark.parametrize("offload", [False, True])
def test_the_estimate_s_ledger_is_the_trainer_s(source, objective, offload, tmp_path):
    fields = {name: value for name, value in CARRIED.items() if name != "num_blocks"}
    way = Way("together", fields, together=True, objective=objective["objective"], offload=offload)
    expected = ledger_of(way, Workload(source, B, batch_size=2, sequence_length=None if source is VIT else 12))
    place = {"offload_inactive_blocks": "cpu" if offload else "none"}
    ledgers = trained(made(source, CARRIED), source, tmp_path, {**objective, **place}).ledgers.values()
    assert max(ledger.total for ledger in ledgers) == pytest.approx(expected.total, rel=0.02)


def test_layers_run_once_a_batch_or_twice(source, objective, tmp_path):
    model, runs = made(source, CARRIED), Counter()
    run, numbers = model._run_layer, {id(layer): k for k, layer in enumerate(l for b in model.blocks for l in b.layers)}

    def counted(layer, *args, **kwargs):
        runs[numbers[id(layer)]] += 1
        return run(layer, *args, **kwargs)

    model._run_layer = counted
    trained(model, source, tmp_path, {**objective, "max_steps": 3, "gradient_accumulation_steps": 2})
    times = {k: 2 if objective is EXACT and k < B - 1 else 1 for k in range(B)}  # (of the last block nothing is dropped)
    assert runs == {k: 3 * 2 * times[k] for k in range(B)}


def test_offloaded_blocks_train_the_same_and_cross_as_the_formula_says(source, objective, tmp_path):
    expected, model = made(source, CARRIED), made(source, CARRIED)
    trained(expected, source, tmp_path, objective)
    seen = []

    class Copied(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(dict(model.offload.copied))

    trained(model, source, tmp_path, {**objective, "offload_inactive_blocks": "cpu"}, Copied())
    assert_same(expected, model)
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    formula = traffic(sizes, [2 * size for size in sizes], objective["objective"], together=True, carried=True)
    counts = 4 * len(list(model.parameters()))  # of Adam's steps, a number each
    for direction, expected_bytes in vars(formula).items():
        assert 0 <= seen[3][direction] - seen[2][direction] - expected_bytes <= counts


@pytest.mark.parametrize("objective_in_turn, fields", [("local", {"context": "independent"}), ("local", {}), ("final", {})], ids=str)
def test_in_turns_no_more_crosses_than_the_formula_says(objective_in_turn, fields, tmp_path):
    """Eight rounds, of which the first has no state; and no less than what trains and comes back."""
    model = made(GPT2, {**CARRIED, **fields})
    arguments = {"objective": objective_in_turn, "block_schedule": "random", "max_steps": 8 * B, "optim": "sgd"}
    arguments["offload_inactive_blocks"] = "cpu"
    trained(model, GPT2, tmp_path, arguments)
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    formula = traffic(sizes, [0] * B, objective_in_turn, together=False, carried=not fields)
    assert 8 * sum(sizes) * 0.7 < model.offload.copied["to_device"] <= 8 * formula.to_device
    assert 8 * sum(sizes) * 0.7 < model.offload.copied["to_host"] <= 8 * formula.to_host
