"""Tiny stock models to stream, and what is compared of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 100, 12
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def llama(**fields) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **SPECIAL, **fields}))


def tiny(mapping: str, name: str) -> Callable[[], nn.Module]:
    return partial(tiny_model, mapping, name, dropout=True)


def tokens(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def _images() -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


@dataclass
class StockModel:
    """How to make one, and a batch of it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]] = tokens

    def __call__(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


MODELS = {
    "llama": StockModel(llama),
    "llama, tied": StockModel(partial(llama, tie_word_embeddings=True)),
    "mixtral": StockModel(tiny("causal-lm", "mixtral")),
    "t5": StockModel(tiny("seq2seq", "t5")),
    "vit": StockModel(tiny("image-classification", "vit"), _images),
    "openai-gpt, checkpoints nothing": StockModel(tiny("causal-lm", "openai-gpt")),
}


def with_checkpointing(model: nn.Module) -> nn.Module:
    """What a streamed model is compared with: the stock one, as its own checkpointing has it add up."""
    if model.supports_gradient_checkpointing and any(hasattr(m, "gradient_checkpointing") for m in model.modules()):
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The stock model with its own checkpointing, and one that is to be streamed."""
    model = MODELS[name]()
    return with_checkpointing(copy.deepcopy(model)).train(), model.train()


def backward(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 0) -> float:
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor | None], second: dict[str, torch.Tensor | None]) -> None:
    """Bit by bit."""
    assert first.keys() == second.keys()
    pairs = {name: (first[name], second[name]) for name in first}
    assert not [
        name for name, (one, two) in pairs.items()
        if (one is None) != (two is None) or (one is not None and not torch.equal(one, two))
    ]  # fmt: skip


def text(rows: int = 40) -> Dataset:
    batch = tokens(rows, seed=3)
    return Dataset.from_dict({name: each.tolist() for name, each in batch.items()})


@pytest.fixture
def model():
    return MODELS["llama"]().train()
