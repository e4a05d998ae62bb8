"""`convert`: what is kept, what is refused, and what the stock model still is inside."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomized
from families import BERT, LLAMA, RECURRENT, RESNET, TEXT_CONFIGS
from process_scenarios import DIT, GPT2, VIT
from tiny_models import tiny_model
from torch import nn
from transformers import BertConfig, GPT2Config, Qwen3Config, SamConfig, ViTConfig, ViTForImageClassification, ViTModel

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


PAPER = {"preset": "paper"}
TEXT = TEXT_CONFIGS["llama"]
DECODER = BertConfig(**{**BERT.to_dict(), "is_decoder": True})
WINDOWS = {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 2}
REFUSED = [
    (lambda: SamConfig(), {}, "model_type='sam' is not supported: it must be an architecture of Transformers"),
    (lambda: db.convert(VIT, 2), {}, r"DiffusionBlocks model already \(num_blocks=2\)"),
    (lambda: db.DiffusionBlocksConfig(source_config=VIT), {}, "DiffusionBlocks model already"),
    (lambda: ViTModel(VIT), {}, "source=ViTModel must be ViTForImageClassification"),
    (lambda: ViTConfig(**{**VIT.to_dict(), "problem_type": "multi_label_classification"}), {},
     "problem_type='multi_label_classification'"),
    (lambda: VIT, {"num_blocks": 5}, "num_blocks=5 must be at most the model's 4 layers"),
    (lambda: VIT, {"task": "text-generation"}, "task='text-generation' must be 'image-class"),
    (lambda: VIT, {"denoise": "joint"}, "denoise: not a field of DiffusionBlocksConfig"),
    *((lambda: GPT2, {"resident_blocks": blocks}, r"resident_blocks=.* must be a list of different blocks of 0\.\.1")
      for blocks in ([], [2], [-1], [0, 0], ["0"], 1)),
    # what an architecture cannot do
    (lambda: BERT, {"task": "text-generation"}, "its tokens see those after them, and must not"),
    (lambda: BERT, {"task": "text-classification", **PAPER}, "preset='paper' must be 'recommended' for model_type='bert'"),
    (lambda: DECODER, {"task": "text-generation", **PAPER}, "AdaLN is known"),
    (lambda: DECODER, {"task": "fill-mask"}, "do not see those after them, and must"),
    (lambda: GPT2Config(n_layer=2, n_embd=32, n_head=4, add_cross_attention=True), PAPER, "add_cross_attention=True"),
    (lambda: Qwen3Config(**WINDOWS, **LLAMA), PAPER, "use_sliding_window=True with max_window_layers=2"),
    (lambda: RECURRENT, {"num_blocks": 2}, "num_blocks=2 must be 1 for model_type='recurrent_depth_llama'"),
    (lambda: RECURRENT, {"num_blocks": 1, "task": "fill-mask"}, "RecurrentDepthLlamaForCausalLM cannot be cut into blocks"),
    (lambda: RESNET, {"local_head_layers": 1}, "local_head_layers=1 must be 0 for model_type='resnet'"),
    (lambda: tiny_model("sequence-classification", "xlm"), {"task": "text-classification", "local_head_layers": 1},
     "local_head_layers=1 must be 0: no module of this model is a layer"),
    # what has no meaning for a task
    (lambda: DIT, {"local_head_layers": 0},
     "local_head_layers=0 must be None with preset='recommended' for task 'image-generation'"),
    (lambda: DIT, {"sigma_data": "auto"}, "sigma_data='auto' must be a finite number above 0"),
    (lambda: DIT, {"label_dropout": 2}, "label_dropout=2 must be a finite number from 0 to 1"),
    (lambda: TEXT, {"task": "fill-mask", "sigma_max": 2}, "sigma_max=2 must be None"),
    (lambda: TEXT, {"task": "fill-mask", "local_head_layers": 2}, "local_head_layers=2 must be None"),
    (lambda: TEXT, {"task": "fill-mask", "mask_token_id": 50}, r"mask_token_id=50 must lie in 0\.\.47, or be 48"),
    (lambda: TEXT, {"mask_token_id": 3}, "mask_token_id=3 must be None with preset='recommended' for task 'text-generation'"),
]  # fmt: skip


@pytest.mark.parametrize("source, fields, message", REFUSED, ids=[f"{message[:50]}" for *_, message in REFUSED])
def test_what_cannot_be_converted_is_refused(source, fields, message):
    with pytest.raises(ValueError, match=message):
        db.convert(source(), **{"num_blocks": 2, **fields})


@pytest.mark.parametrize(("source", "error"), [(7, TypeError), ("no/such-folder", OSError)])
def test_what_is_no_source_is_named(source, error):
    with pytest.raises(error, match="source=int must be a PreTrainedModel|couldn't find them in the cached files"):
        db.convert(source)


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
