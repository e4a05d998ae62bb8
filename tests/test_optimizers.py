"""Optimizers that step in the backward pass: the same weights, no gradients, and what they refuse."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from families import CASES, trainer_of
from streaming_models import LENGTH, VOCABULARY, assert_same, llama, weights
from test_streaming_training import trained
from torch import nn

import hf_diffusionblocks as db

ONE_BY_ONE = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1}


def in_backward(folder, streamed: bool = True, **given):
    return trained(folder, streamed, callbacks=[db.OptimizerInBackward()], **ONE_BY_ONE, **given)


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd"])
def test_the_stock_trainer_ends_with_the_same_weights(tmp_path, optim, streamed):
    """With a schedule of the learning rate and decay by groups."""
    given = {"optim": optim, "lr_scheduler_type": "cosine"}
    assert_same(
        weights(trained(tmp_path, False, **ONE_BY_ONE, **given).model), weights(in_backward(tmp_path, streamed, **given).model)
    )


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    whole = in_backward(tmp_path, save_strategy="steps", save_steps=3)
    resumed = in_backward(tmp_path / "resumed", max_steps=1)  # (another run, whose optimizer is replaced)
    resumed.args.max_steps = 5
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("optimizer_device", ["host", "device"])
def test_no_gradient_is_left_and_nothing_is_copied_twice(optimizer_device):
    copied = []
    for steps_in_backward in (False, True):
        model = llama().train()
        stream = db.stream_layers(model, "cpu", keep=1, optimizer_device=optimizer_device)
        optimizer = torch.optim.AdamW(model.parameters())
        if steps_in_backward:
            db.OptimizerInBackward.attach(optimizer)
        for _ in range(3):
            before, tokens = stream.copied, torch.randint(VOCABULARY, (2, LENGTH))
            model(input_ids=tokens, labels=tokens).loss.backward()
            assert all((parameter.grad is None) == steps_in_backward for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        copied.append({way: size - before[way] for way, size in stream.copied.items()})
    assert copied[0] == copied[1]


def steps(model: nn.Linear) -> int:
    """How many optimizers a backward pass moves it by 1 each."""
    before = model.weight.detach().clone()
    model(torch.ones(1, 1)).sum().backward()
    model.weight.grad = None
    return round((before - model.weight).item())


def test_a_parameter_has_one_optimizer_as_long_as_that_lives(tmp_path):
    model = nn.Linear(1, 1)
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        db.OptimizerInBackward.attach(optimizer)
    assert steps(model) == 1
    del optimizer
    gc.collect()
    assert steps(model) == 0


def test_after_training_gradients_stay(tmp_path):
    trainer = in_backward(tmp_path)
    trainer.model(input_ids=torch.zeros(1, 4, dtype=int), labels=torch.zeros(1, 4, dtype=int)).loss.backward()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 must be 0 "),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 must be 1 "),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, False, callbacks=[db.OptimizerInBackward()], **{**ONE_BY_ONE, **given})


def test_optimizers_that_count_for_all_parameters_are_refused():
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1
            return super().step(closure)

    with pytest.raises(ValueError, match="Counts must count steps by parameter, as AdamW does, and keeps 'steps'"):
        db.OptimizerInBackward.attach(Counts(llama().parameters(), lr=1.0))


def test_several_processes_are_refused(monkeypatch):
    several = SimpleNamespace(**ONE_BY_ONE, fp16=False, world_size=2)
    with pytest.raises(ValueError, match="world_size=2 must be 1 "):
        db.OptimizerInBackward.check(several)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="needs one process"):
        db.OptimizerInBackward.attach(torch.optim.SGD(llama().parameters(), lr=1.0))


def test_blocks_do_without(tmp_path):
    case = CASES["point"]
    trainer = trainer_of(case.model(), case, tmp_path, callbacks=[db.OptimizerInBackward()], max_grad_norm=0.0)
    with pytest.raises(ValueError, match="callbacks must hold no OptimizerInBackward"):
        trainer.train()
