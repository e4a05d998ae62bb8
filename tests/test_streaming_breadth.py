"""Streaming of stock architectures, tiny and random: a sample of what `benchmarks/breadth.py` runs over all of them."""

from __future__ import annotations

import sys

import breadth
import breadth_check
import pytest
import torch
from breadth_check import HostWatch, check
from torch import nn

#: What each is in for: attention of several kinds, experts, recurrences, shared layers, layers that hold layers, reversible
#: ones, encoder and decoder, towers of images, convolutions, models that checkpoint nothing, and blocks of diffusers parts of
#: which are called from outside.
SAMPLE = [
    ("causal-lm", "llama"), ("causal-lm", "gpt2"), ("causal-lm", "gemma3"), ("causal-lm", "mixtral"), ("causal-lm", "mamba"),
    ("causal-lm", "zamba2"), ("causal-lm", "openai-gpt"), ("causal-lm", "xlnet"),
    ("sequence-classification", "albert"), ("sequence-classification", "qwen3"),
    ("token-classification", "bert"), ("token-classification", "deberta-v2"),
    ("question-answering", "mpnet"), ("masked-lm", "modernbert"), ("masked-lm", "reformer"),
    ("image-classification", "vit"), ("image-classification", "convnext"),
    ("seq2seq", "t5"), ("seq2seq", "bart"),
    ("diffusers", "DiTTransformer2DModel"),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "name"), SAMPLE)
def test_gradients_are_the_stock_models_and_nothing_runs_on_host_weights(mapping, name):
    result = check(mapping, name)
    assert not result.error
    assert result.exact, (result.difference, result.differs)
    assert result.on_host == []
    assert result.two_units and result.enough_moved, (result.peak_units, result.moved)


def test_with_the_dropout_of_its_config():
    result = check("own-dropout", "gpt2")
    assert result.holds and result.exact, result


def test_what_runs_on_host_weights_is_seen_and_copies_are_not():
    unit = nn.Linear(4, 4)
    with HostWatch({"unit": unit}) as watch:
        copy = unit.weight.detach().clone()
        nn.functional.linear(torch.ones(1, 4), copy)
        assert watch.found == set()
        nn.functional.linear(torch.ones(1, 4), unit.weight)
    assert watch.found and all(each.startswith("unit.weight: ") for each in watch.found)


def test_a_wrong_gradient_is_told_with_its_name(monkeypatch):
    def shifted(model, batch, step, stock=breadth_check.gradients):
        found = stock(model, batch, step)
        if hasattr(model, "_stream"):
            found["model.norm.weight"] = found["model.norm.weight"] * 1.5
        return found

    monkeypatch.setattr(breadth_check, "gradients", shifted)
    result = check("causal-lm", "llama")
    assert not result.holds and result.differs == "model.norm.weight" and result.difference == pytest.approx(0.5)


def test_a_process_that_ends_or_hangs_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(breadth, "_work", _ends_or_hangs)
    monkeypatch.setattr(breadth, "START_METHOD", "fork")  # sooner, and these use no threads
    monkeypatch.setattr(sys, "argv", ["breadth.py", "--jobs", "2", "--seconds", "1"])
    arguments = breadth._arguments()
    found = {each.name: each.error for each in breadth._run([("causal-lm", "ends"), ("causal-lm", "hangs")], arguments)}
    assert found == {"ends": "the process ended with status 3", "hangs": "takes longer than it may"}


def _ends_or_hangs(pipe):
    import time

    _, name = pipe.recv()
    pipe.send(None)
    if name == "ends":
        sys.exit(3)
    time.sleep(1000)
