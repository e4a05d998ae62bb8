"""Tiny stock models to stream, and what is compared of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel, T5Config,
    T5ForConditionalGeneration, ViTConfig, ViTForImageClassification,
)  # fmt: skip

VOCABULARY, LENGTH = 100, 12
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def llama(**fields) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **SPECIAL, **fields}))


def _openai_gpt() -> OpenAIGPTLMHeadModel:
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=32))


def _t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)
    )


def _mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, **SPECIAL,
        )
    )  # fmt: skip


def _vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4,
            num_channels=1, num_labels=5, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip


def tokens(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def _images() -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([1, 3])}


@dataclass
class StockModel:
    """How to make one, and a batch of it."""

    make: Callable[..., nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]] = tokens
    fields: dict = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make(**self.fields)


MODELS = {
    "llama": StockModel(llama),
    "llama, tied": StockModel(llama, fields={"tie_word_embeddings": True}),
    "mixtral": StockModel(_mixtral),
    "t5": StockModel(_t5),
    "vit": StockModel(_vit, _images),
    "openai-gpt, checkpoints nothing": StockModel(_openai_gpt),
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
