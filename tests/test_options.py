"""Gradient checkpointing, bf16 autocast and compiled layers: what they change, and what they must not."""

from __future__ import annotations

import pytest
import torch
from process_scenarios import CARRIED, GPT2, INDEPENDENT, LLAMA, VIT, made, trainer_of
from torch._dynamo.testing import CompileCounterWithBackend

CASES = {
    "gpt2-carried": (GPT2, CARRIED, None),
    "llama-carried": (LLAMA, CARRIED, None),
    "gpt2-joint": (GPT2, {}, None),
    "vit-joint": (VIT, {}, None),
    "gpt2-job": (GPT2, INDEPENDENT, [1]),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def trained(case, folder, batch=4, **arguments):
    source, fields, resident = case
    trainer = trainer_of(made(source, fields, resident), source, folder, {"max_steps": 6, **arguments}, batch)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True must be False"),
        ({"every_n_layers": 2}, "every_n_layers=2 must be 1"),
    ],
)
def test_checkpointing_that_would_not_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        made(GPT2, {}).activation_checkpointing_enable(**arguments)


def test_checkpointing_changes_memory_alone(case, tmp_path):
    kept, computed_again = trained(case, tmp_path), trained(case, tmp_path, activation_checkpointing=True)
    assert losses(computed_again) == pytest.approx(losses(kept), abs=1e-6)
    activations = [max(ledger.parts.activations for ledger in trainer.ledgers.values()) for trainer in (computed_again, kept)]
    assert activations[0] < 0.7 * activations[1]


def test_autocast_computes_in_bf16(case, tmp_path):
    whole, half = trained(case, tmp_path), trained(case, tmp_path, bf16=True)
    assert losses(half) == pytest.approx(losses(whole), abs=0.1)
    assert losses(half) != losses(whole)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2-carried", "vit-joint"])
def test_one_graph_serves_the_layers_of_all_blocks(name, tmp_path):
    """One that trains, one that runs forward for later blocks: not one a layer or a block."""
    source, fields, _ = CASES[name]
    case = (source, {**fields, "num_blocks": 4}, None)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    arguments = {"max_steps": 6, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = trainer_of(made(source, case[1]), source, tmp_path, arguments, 4)
    trainer.model.compile_layers(backend=counter)  # the same, counted
    trainer.train()
    assert 1 <= counter.frame_count <= 3
    assert losses(trainer) == pytest.approx(losses(trained(case, tmp_path)), abs=1e-4)
    assert trainer.model_wrapped is trainer.model  # not compiled as a whole
