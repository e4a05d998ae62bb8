"""`convert`: what is kept, what is refused, and what the stock model still is inside."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomized
from torch import nn
from transformers import SamConfig, ViTConfig, ViTForImageClassification, ViTModel

import hf_diffusionblocks as db


def plain_logits(model: db.DiffusionBlocksForImageClassification, batch) -> torch.Tensor:
    """All layers in order, block by block, modulated as the paper's start: the stock forward, rebuilt."""
    if model.config.preset == "recommended":
        return model.block_logits(batch["pixel_values"])[:, -1]
    hidden = model.architecture.embed(model.backbone, pixel_values=batch["pixel_values"])
    for block in model.blocks:
        hidden = block.run(hidden, block.modulations(torch.full((1,), 0.7)))
    return model.architecture.read_out(model.backbone, hidden)


def test_weights_are_kept_and_the_source_is_untouched(plain_model, formulation):
    before = copy.deepcopy(plain_model.state_dict())
    config_before = copy.deepcopy(vars(plain_model.config))
    model = randomized(db.convert(plain_model, num_blocks=2, **formulation))
    assert vars(plain_model.config) == config_before
    for name, tensor in plain_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert not torch.equal(tensor, model.state_dict()[f"backbone.{name}"]), name


@pytest.mark.parametrize("start", ["pretrained", "fresh"])
def test_a_block_s_layers_start_as_the_plain_ones(start, plain_model, plain_config, batch, formulation, tmp_path):
    """Bit for bit, at any sigma, and again after a save and a load."""
    source = plain_model if start == "pretrained" else plain_config
    model = db.convert(source, num_blocks=2, **formulation).eval()
    with torch.no_grad():
        expected = model.backbone(batch["pixel_values"]).logits
        assert torch.equal(plain_logits(model, batch), expected)
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(plain_logits(reloaded, batch), expected)


def test_modulation_acts_once_it_has_moved(plain_model, batch):
    """Positive control of the test above."""
    model = randomized(db.convert(plain_model, num_blocks=2, preset="paper")).eval()
    with torch.no_grad():
        assert not torch.allclose(plain_logits(model, batch), model.backbone(batch["pixel_values"]).logits)


def test_missing_modulations_start_at_zero(plain_model, plain_config, batch, tmp_path):
    """Plain weights loaded straight into the class: what the checkpoint lacks is initialised, not left to chance."""
    plain_model.save_pretrained(tmp_path)
    config = db.DiffusionBlocksConfig(source_config=plain_config, num_blocks=2, preset="paper")
    model = db.DiffusionBlocksForImageClassification.from_pretrained(tmp_path, config=config)
    with torch.no_grad():
        assert torch.equal(plain_logits(model, batch), plain_model(batch["pixel_values"]).logits)
    assert all(not p.any() for p in model.modulations.parameters())


def test_from_a_folder(plain_model, batch, tmp_path):
    plain_model.save_pretrained(tmp_path)
    model = db.convert(tmp_path, num_blocks=2, preset="recommended", local_head_layers=0)
    assert model.config.base_model is None  # a hub id would be kept; a local path means nothing to others
    with torch.no_grad():
        assert torch.equal(model(pixel_values=batch["pixel_values"]).logits, plain_model(batch["pixel_values"]).logits)


def test_pickled_weights_are_not_loaded(plain_model, tmp_path):
    plain_model.config.save_pretrained(tmp_path)
    torch.save(plain_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        db.convert(tmp_path, num_blocks=2, preset="paper")


def test_device_dtype_and_mode_are_the_source_s(plain_model):
    model = db.convert(plain_model.to(torch.bfloat16).train(), num_blocks=2, preset="paper")
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_attention_implementation_is_the_source_s(plain_model):
    plain_model.set_attn_implementation("eager")
    model = db.convert(plain_model, num_blocks=2, preset="paper")
    assert model.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "source, fields, error, message",
    [
        (lambda c: SamConfig(), {}, ValueError, r"model_type='sam' is not supported: it must be an architecture of Transformers"),
        (lambda c: db.convert(c, 2, preset="paper"), {}, ValueError, r"DiffusionBlocks model already \(num_blocks=2\)"),
        (lambda c: db.DiffusionBlocksConfig(source_config=c), {}, ValueError, r"DiffusionBlocks model already"),
        (lambda c: ViTModel(c), {}, ValueError, r"source=ViTModel must be ViTForImageClassification"),
        (lambda c: c, {"num_blocks": 5}, ValueError, r"num_blocks=5 must be at most the model's 4 layers"),
        (lambda c: c, {"layers_per_block": [1, 1], "num_blocks": 2}, ValueError, r"layers_per_block=\[1, 1\]"),
        (lambda c: c, {"task": "text-generation"}, ValueError, r"task='text-generation' must be 'image-class"),
        (lambda c: c, {"denoise": "joint"}, ValueError, r"denoise: not a field of DiffusionBlocksConfig"),
        (lambda c: 7, {}, TypeError, r"source=int must be a PreTrainedModel"),
        (lambda c: "no/such-folder", {}, OSError, r"couldn't find them in the cached files"),
        (lambda c: ViTConfig(**{**c.to_dict(), "problem_type": "multi_label_classification"}), {}, ValueError,
         r"problem_type='multi_label_classification'"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(plain_config, source, fields, error, message):
    with pytest.raises(error, match=message):
        db.convert(source(plain_config), preset="paper", **fields)


def changed(model: ViTForImageClassification, how: str) -> ViTForImageClassification:
    if how == "head":
        model.classifier = nn.Sequential(nn.Dropout(0.1), model.classifier)
    elif how == "extra":
        model.adapter = nn.Linear(2, 2)
    elif how == "hook":
        model.classifier.register_forward_hook(lambda module, args, output: 2 * output)
    elif how == "config":
        model.config.layer_norm_eps = 1.0
    return model


@pytest.mark.parametrize("how", ["head", "extra", "hook", "config"])
def test_a_source_that_is_not_as_its_class_makes_it_is_refused(how, plain_model):
    message = "must have the weights" if how in ("head", "extra") else "must be as its class and config make it"
    with pytest.raises(ValueError, match=f"source=ViTForImageClassification {message}"):
        db.convert(changed(plain_model, how), 2)
