"""Text models of each architecture in each formulation, for tests of what is text's alone; its fixtures are imported."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomized
from families import PAPER_TEXT, TEXT_CONFIGS, TEXT_FORMULATIONS, VOCAB, WIDTH
from transformers import AutoModelForCausalLM

import hf_diffusionblocks as db

LENGTH = 10
BLOCKS = [0, 1]


@pytest.fixture(params=TEXT_CONFIGS.values(), ids=TEXT_CONFIGS.keys())
def text_config(request):
    return copy.deepcopy(request.param)


@pytest.fixture(params=TEXT_FORMULATIONS.values(), ids=TEXT_FORMULATIONS.keys())
def text_formulation(request) -> dict:
    return request.param


@pytest.fixture(params=PAPER_TEXT.values(), ids=PAPER_TEXT.keys())
def joint(request) -> dict:
    return request.param


@pytest.fixture
def plain(text_config):
    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(text_config)).eval()


def make(plain, **fields) -> db.DiffusionBlocksForCausalLM:
    """Converted to two blocks, every parameter (AdaLN included) away from its start."""
    return randomized(db.convert(plain, **{"num_blocks": 2, "preset": "paper", **fields})).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def draw(sigma: float = 0.3) -> dict[str, torch.Tensor]:
    """Fixed noise for the batch of `ids`."""
    noise = torch.randn(3, LENGTH - 1, WIDTH, generator=torch.Generator().manual_seed(2))
    return {"sigma": torch.full((3,), sigma), "noise": noise}


def draw_of(model) -> dict[str, torch.Tensor]:
    """The same, where there is noise."""
    return draw() if model.noise_schedule else {}


def layer_of(model, index: int):
    return model.backbone.get_submodule(model.layers_path)[index]


def block_logits(model, ids, block_index, labels=None, **kwargs) -> torch.Tensor:
    labels = ids if labels is None else labels
    with torch.no_grad():
        return model(ids, labels=labels, block_index=block_index, return_logits=True, **{**draw_of(model), **kwargs}).logits
