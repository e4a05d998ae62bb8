"""A block as a thing: which parameters are its own, and which blocks run before it."""

from __future__ import annotations

import pytest
import torch
from process_scenarios import GPT2, VIT

import hf_diffusionblocks as db
from hf_diffusionblocks.training.checks import trained_parameters
from hf_diffusionblocks.saving.shards import Provenance


def model_of(**fields) -> db.DiffusionBlocksForCausalLM:
    return db.convert(type(GPT2)(**{**GPT2.to_dict(), "n_layer": 12}), 3, **{"preset": "paper", **fields})


def test_a_block_owns_its_layers_and_no_others():
    """Also where a layer's number begins with another's."""
    model = model_of(layers_per_block=[2, 8, 2])
    for layer in range(12):
        owner = model.block_of_parameter(f"backbone.transformer.h.{layer}.ln_1.weight")
        assert owner == next(k for k in range(3) if layer in model.block_layers(k))
    assert [model.blocks[k].layers[0] is model.backbone.transformer.h[first] for k, first in enumerate((0, 2, 10))] == [
        True
    ] * 3


@pytest.mark.parametrize("preset, predecessors", [("recommended", [[], [0], [0, 1]]), ("paper", [[], [], []])])
def test_which_blocks_run_before_it(preset, predecessors):
    assert [list(block.predecessors) for block in model_of(preset=preset).blocks] == predecessors


def test_a_run_s_blocks_alone_ask_for_gradients_and_what_was_frozen_stays():
    model = model_of(preset="recommended")
    (frozen, *_), other = model.block_parameters(0), model.block_parameters(2)
    frozen.requires_grad_(False)
    with trained_parameters(model, [0, 1], train_shared=False) as trained:
        asking = {model.block_of_parameter(name) for name, p in model.named_parameters() if p.requires_grad}
        assert asking == {0, 1} and any(frozen is p for p in trained[0])  # which a callback may thaw
        trained[1][0].requires_grad_(False)  # by a callback, say
    assert all(p.requires_grad for p in other)
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen, trained[1][0]]


def test_a_block_holds_no_tensor_of_its_own_and_finds_what_replaces_a_module():
    model = db.convert(VIT, 2)
    assert len(model.state_dict()) == len(set(model.state_dict())) and "blocks" not in dict(model.named_children())
    model.backbone.vit.layers[0] = torch.nn.Identity()
    assert model.blocks[0].layers[0] is model.backbone.vit.layers[0]


@pytest.mark.parametrize("resident", [None, [1]])
def test_a_loaded_model_knows_who_trained_it(tmp_path, resident):
    model = db.convert(GPT2, 2)
    model.provenance = Provenance([0, 3])
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, resident_blocks=resident).provenance == model.provenance
