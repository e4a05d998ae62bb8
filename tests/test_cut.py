"""Cutting stock models into blocks, whatever their architecture: tiny and random, a sample of what `benchmarks/breadth_cut.py`
runs over all of them."""

from __future__ import annotations

import copy

import breadth_cut
import pytest
import torch
from families import BERT, RESNET, TEXT_CONFIGS, watching
from tiny_models import tiny_model
from torch.nn import functional as F
from transformers import (
    BertForMaskedLM, BertForSequenceClassification, LlamaForCausalLM, SwinConfig, SwinForImageClassification,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones import stock_run
from hf_diffusionblocks.backbones.base import parts_around
from hf_diffusionblocks.models import block as block_module
from hf_diffusionblocks.models.verification import check_cut
from hf_diffusionblocks.tasks import TASKS, backbone_for

#: What each is in for: soft caps and windows, shared keys and values, buffers that are not saved, experts, states instead of
#: attention, two norms, layers that return several things, towers of images, layers that count as two, an encoder before the
#: decoder, rows that say how a batch is padded, stages of several widths; a part of a composite, layers that hand on what the
#: next one needs, that share parameters, or are of several parts; what is kept of weights; images as tokens, and as patches.
SAMPLE = [
    ("causal-lm", "gemma2"), ("causal-lm", "gemma4_text"), ("causal-lm", "falcon_h1"), ("causal-lm", "gpt_oss"),
    ("causal-lm", "mamba"),
    ("causal-lm", "openai-gpt"), ("causal-lm", "gemma3"), ("causal-lm", "phi3"), ("causal-lm", "longcat_flash"),
    ("masked-lm", "deberta-v2"),
    ("masked-lm", "roberta"), ("sequence-classification", "bart"), ("sequence-classification", "distilbert"),
    ("sequence-classification", "qwen3"), ("image-classification", "dinov2"), ("image-classification", "beit"),
    ("image-classification", "resnet"), ("image-classification", "swin"), ("image-classification", "pvt_v2"),
    ("image-classification", "mobilevit"),
    ("causal-lm", "emu3"), ("causal-lm", "hy_v4"), ("sequence-classification", "t5"), ("causal-lm", "zamba2"),
    ("masked-lm", "xlm"), ("image-classification", "pvt"), ("image-classification", "levit"),
    ("image-classification", "imagegpt"), ("image-classification", "siglip2"),
]  # fmt: skip
#: What cannot be cut, and what is said of it.
REFUSED = {
    ("masked-lm", "albert"): "must have a list of 4 layers",  # one layer, several times over
    ("causal-lm", "mllama"): "its forward does not call the layers",  # which an image alone is for
    ("causal-lm", "musicgen"): "what was cut cannot be compared with MusicgenForCausalLM",  # rows of several streams
    ("image-classification", "pp_lcnet"): "object has no attribute 'logits'",
    ("causal-lm", "xlnet"): "its tokens see those after them, and must not",
}


@pytest.mark.parametrize(("mapping", "name"), SAMPLE)
def test_blocks_are_the_stock_model_there_and_back(mapping, name):
    """Logits bit by bit, gradients; and saved, loaded and as a plain model again."""
    assert breadth_cut.tried(mapping, name) == "cut"


@pytest.mark.parametrize(("mapping", "name"), REFUSED)
def test_what_cannot_be_cut_is_refused(mapping, name):
    assert REFUSED[mapping, name] in breadth_cut.tried(mapping, name)


@torch.no_grad()
def test_labels_are_of_the_next_token_whatever_the_stock_loss_takes():
    """BART's takes labels that are shifted before."""
    model, tokens = db.convert(tiny_model("causal-lm", "bart"), 2).eval(), torch.arange(1, 9)[None]
    found = model(tokens, labels=tokens)
    assert torch.allclose(found.loss, F.cross_entropy(found.logits[0, :-1], tokens[0, 1:]))


def test_a_fresh_part_of_what_a_constructor_alone_sets_is_refused():
    """Apertus' activations; of a model, they are copied."""
    plain = tiny_model("causal-lm", "apertus")
    with pytest.raises(
        ValueError, match=r"resident_blocks=\[1\] must be None: backbone.*alpha_p has its value from the constr"
    ):
        db.convert(plain.config, 2, resident_blocks=[1])
    part = db.convert(plain, 2, resident_blocks=[1])
    assert all(tensor.isfinite().all() for tensor in part.state_dict().values())


# ---- stages


def test_batch_norms_count_in_their_own_block_s_step_alone():
    """Of a ResNet; its stem's in block 0's."""
    model = db.convert(RESNET, 4).train()
    for block in model.blocks:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(**TASKS["image-classification"].example(RESNET, 4, None), block_index=block.index)
        moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
        assert moved and {model.block_of_parameter(name) for name in moved} - {None} == {block.index}
        assert any(name.startswith("backbone.resnet.embedder.") for name in moved) is (block.index == 0)


def test_batch_norms_count_a_batch_once_though_checkpointing_repeats_it():
    """Later blocks' steps run by what earlier ones have counted. (Of a plain model, evaluation alone does.)"""
    model = db.convert(tiny_model("image-classification", "mobilevit"), 2)
    batch, found = TASKS[model.task].example(model.config.source_config, 4, None), []
    for checkpoints in (False, True):
        each = copy.deepcopy(model)
        if checkpoints:
            each.gradient_checkpointing_enable()
            each = copy.deepcopy(each)  # (which counts for itself)
        for block in (0, 1):
            each(**batch, block_index=block).loss.backward()
        found.append([*each.buffers(), *(parameter.grad for parameter in each.parameters())])
    assert all(map(torch.equal, *found))


def test_stages_after_a_block_are_not_run():
    model, images = db.convert(RESNET, 4).train(), TASKS["image-classification"].example(RESNET, 4, None)
    with watching(model.layers[0]) as before, watching(model.layers[1]) as own, watching(model.layers[2]) as after:
        entering = model(**images, block_index=0).hidden_states[0]
        model(**images, block_index=1, block_input=entering)
    assert (len(before), len(own), len(after)) == (1, 1, 0) and torch.equal(own[0], entering)


def test_stages_of_half_precision_are_compared_too():
    """Of a ConvNeXt, which does not cast images itself."""
    plain = tiny_model("image-classification", "convnext").to(torch.bfloat16)
    model = db.convert(plain, 2)
    assert check_cut(model, TASKS[model.task].example(plain.config, 2, None))


def test_a_converted_model_knows_of_no_image_yet():
    """A Swin that has seen images of few windows shifts none in larger ones."""
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=5)
    plain, images = SwinForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(db.convert(plain, 2)(images).logits, plain(images).logits)


def test_widths_of_several_stages_are_no_hidden_size():
    config = db.convert(RESNET, 2).config
    assert not hasattr(config, "hidden_size") and config.hidden_sizes == RESNET.hidden_sizes


def test_images_of_patches_are_trained_on_and_told_apart(tmp_path):
    """Siglip 2 takes masks and shapes beside: the Trainer keeps them."""
    model = db.convert(tiny_model("image-classification", "siglip2").eval(), 2)
    batch = TASKS[model.task].example(model.config.source_config, 4, None)
    arguments = db.DiffusionBlocksTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(4)]
    assert db.DiffusionBlocksTrainer(model.train(), arguments, train_dataset=rows).train().training_loss > 0
    x, stock = model.stock_inputs(batch), model.eval().to_plain()
    with torch.no_grad():
        assert torch.equal(model.predict(**x).logits, stock(**x).logits)
        assert torch.equal(model.block_logits(**x)[:, -1], stock(**x).logits)


# ---- layers that share parameters, and layers of several parts


def test_what_layers_of_several_blocks_share_is_no_block_s_and_jobs_load_it(tmp_path):
    """Zamba's third and last layers have one transformer."""
    plain = tiny_model("causal-lm", "zamba").eval()
    plain.save_pretrained(tmp_path / "plain")
    whole = db.convert(plain, 2)
    whole.save_pretrained(tmp_path / "blocks")
    names = [name for name in whole.state_dict() if "shared_transf" in name]
    assert names and {whole.block_of_parameter(name) for name in names} == {None}
    for resident in ([0], [0, 1]):
        for job in (
            db.convert(tmp_path / "plain", 2, resident_blocks=resident),
            type(whole).from_pretrained(tmp_path / "blocks", resident_blocks=resident),
        ):
            assert {whole.block_of_parameter(name) for name in job.state_dict()} == {None, *resident}
            assert all(torch.equal(each, whole.state_dict()[name]) for name, each in job.state_dict().items())
    assert db.convert(tiny_model("causal-lm", "zamba"), 1).block_of_parameter(names[0]) == 0


def test_jobs_have_the_parts_of_their_layers_alone(tmp_path):
    tiny_model("masked-lm", "xlm").save_pretrained(tmp_path)
    job = db.convert(tmp_path, 2, "fill-mask", resident_blocks=[1])
    kept = {name.split(".")[2] for name, _ in job.named_parameters() if name.split(".")[3] in ("0", "1")}
    assert not kept and job.block_of_parameter("backbone.transformer.attentions.2.q_lin.weight") == 1
    tokens = torch.arange(20, 28)[None]
    assert job(tokens, labels=tokens, block_index=1).loss.isfinite()


def test_what_is_kept_of_weights_in_evaluation_is_forgotten_with_the_next_pass():
    """LeViT's biases of attention: earlier blocks are evaluated while one trains."""
    model = db.convert(tiny_model("image-classification", "levit"), 2).train()
    batch = TASKS[model.task].example(model.config.source_config, 4, None)
    before = model.passed_on(model.blocks[0], batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.randn_like(parameter)
    assert not torch.equal(model.passed_on(model.blocks[0], batch), before)


# ---- running one block


@pytest.fixture
def model():
    torch.manual_seed(0)
    return db.convert(LlamaForCausalLM(TEXT_CONFIGS["llama"]).eval(), 2, local_head_layers=1)


TOKENS = {"input_ids": torch.arange(12).view(2, 6)}


def test_layers_of_other_blocks_run_without_gradient_before_and_not_at_all_after(model):
    with watching(model.layers[0]) as before, watching(model.layers[2]) as after:
        leaving = model.blocks[0].run_stock(TOKENS).leaving
        assert (len(before), len(after)) == (1, 0) and leaving.requires_grad
    entering = model.blocks[0].run_stock(TOKENS).leaving.detach()
    with watching(model.layers[0]) as before, watching(model.layers[2]) as own:
        given = model.blocks[1].run_stock(TOKENS, entering).leaving
        assert (len(before), len(own)) == (0, 1)
    assert torch.equal(given, model.blocks[1].run_stock(TOKENS).leaving)


def test_the_stock_model_is_as_before_after_a_block_and_after_an_error(model):
    modes, modules = [each.training for each in model.modules()], [*model.modules()]

    class Stopped(Exception):
        pass

    def stops(*args):
        raise Stopped

    hook = model.layers[2].register_forward_pre_hook(stops)
    with pytest.raises(Stopped):
        model.blocks[1].run_stock(TOKENS)
    hook.remove()
    model.blocks[1].run_stock(TOKENS)
    assert all("forward" not in vars(layer) for layer in model.layers)
    assert [*model.modules()] == modules and [each.training for each in model.modules()] == modes


def test_the_head_alone_is_the_stock_model_s(model):
    read = model.blocks[-1].run_stock(TOKENS).read
    assert torch.equal(model.blocks[-1].head(read.flatten(0, 1)).unflatten(0, read.shape[:2]), model(**TOKENS).logits)


def test_a_layer_that_hands_on_more_than_hidden_states_is_seen(model, monkeypatch):
    """Positive control of the comparison: blocks after the first are given something else."""
    batch = {**TOKENS, "labels": TOKENS["input_ids"]}
    assert check_cut(model, batch)
    monkeypatch.setattr(stock_run, "tree_map_only", lambda kind, clone, hidden: hidden * 1.001)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be cut into blocks: their logits differ from the model's by"):
        check_cut(model, batch)


def test_a_head_that_reads_more_than_rows_is_seen(model, monkeypatch):
    head = block_module.Block.head
    monkeypatch.setattr(block_module.Block, "head", lambda block, rows: head(block, rows) * 1.01)
    with pytest.raises(ValueError, match="read out row by row, its logits differ by 0.01 of the largest"):
        check_cut(model, {**TOKENS, "labels": TOKENS["input_ids"]})


def test_a_part_of_another_block_is_seen(monkeypatch):
    model = db.convert(LlamaForCausalLM(TEXT_CONFIGS["llama"]), 2)
    owner = type(model).block_of_parameter
    monkeypatch.setattr(type(model), "block_of_parameter", lambda self, name: 0 if "layers.2." in name else owner(self, name))
    with pytest.raises(
        ValueError, match=r"block 1 reads backbone\.model\.layers\.2\.\S+, which shared='common' makes block 0's"
    ):
        check_cut(model, {**TOKENS, "labels": TOKENS["input_ids"]})


# ---- which stock class


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_a_model_says_what_it_is_for(kind, tmp_path):
    expected = {BertForMaskedLM: "fill-mask", BertForSequenceClassification: "text-classification"}[kind]
    plain = kind(copy.deepcopy(BERT))  # (saved, it says its class)
    plain.save_pretrained(tmp_path)
    assert db.convert(plain, 2).task == db.convert(tmp_path, 2).task == expected
    assert backbone_for(BERT, expected).plain_class is kind


def test_a_config_alone_is_for_the_usual_task():
    assert {name: db.convert(config, 2).task for name, config in TEXT_CONFIGS.items()} == dict.fromkeys(
        TEXT_CONFIGS, "text-generation"
    )
    assert db.convert(BERT, 2).task == "fill-mask"


def test_what_stands_beside_the_base_model_is_its_head_wherever_it_is_made():
    plain = tiny_model("causal-lm", "camembert")
    assert [*dict(plain.named_children())][0] == "lm_head"
    assert parts_around(plain, "roberta.encoder.layer") == (["roberta.embeddings"], ["lm_head"])


def test_parts_stand_before_the_layers_or_after_them():
    found = parts_around(BertForSequenceClassification(BERT), "bert.encoder.layer")
    assert found == (["bert.embeddings"], ["dropout", "classifier", "bert.pooler"])
