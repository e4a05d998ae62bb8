"""What users bring to be converted, loaded and saved: other tensors, adapters, foreign files, names of all kinds."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from families import CASES, TEXT_CONFIGS, VOCAB, WIDTH
from peft import LoraConfig, get_peft_model
from process_scenarios import GPT2, VIT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.saving import cards

SHARD = "model-0000{}-of-00003.safetensors"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """A folder of a model of two blocks."""
    db.convert(GPT2, 2).save_pretrained(tmp_path / "blocks")
    return tmp_path / "blocks"


# ---- a head that differs from the embedding, though the config ties them


@pytest.fixture
def merged_adapter(tmp_path):
    """A folder as a merged adapter leaves it."""
    AutoModelForCausalLM.from_config(TEXT_CONFIGS["gpt2"]).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": torch.randn(VOCAB, WIDTH)}, file, metadata={"format": "pt"})
    return tmp_path / "plain"


@torch.no_grad()
@pytest.mark.parametrize("shared", ["common", "per_block"])
def test_an_untied_head_is_kept(merged_adapter, shared, ids, tmp_path):
    """Converted from the folder or the model, saved, loaded in part, and back in a stock model."""
    logging.set_verbosity_error()
    plain = AutoModelForCausalLM.from_pretrained(merged_adapter).eval()
    expected = plain(ids).logits
    for source in (plain, merged_adapter):
        model = db.convert(source, 2, shared=shared).eval()
        assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "blocks")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "blocks")(ids).logits, expected)
    part = type(model).from_pretrained(tmp_path / "blocks", resident_blocks=[1])
    assert torch.equal(part.backbone.lm_head.weight, plain.lm_head.weight)
    model.to_plain().save_pretrained(tmp_path / "back")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "back")(ids).logits, expected)


# ---- weights that are no plain numbers, and adapters


@pytest.mark.parametrize("way", ["convert", "save"])
def test_codes_without_their_scales_are_refused(way, tmp_path):
    plain = AutoModelForCausalLM.from_config(GPT2)
    model = plain if way == "convert" else db.convert(plain, 2)
    layer = (model if way == "convert" else model.backbone).transformer.h[0].mlp.c_fc
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp.c_fc.weight is quantised \(Tensor, torch.int8\): .*full precision"):
        db.convert(model, 2) if way == "convert" else model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["PeftModel", "add_adapter", "folder", "from_pretrained"])
def test_a_source_with_adapters_is_refused(way, tmp_path):
    plain, lora = AutoModelForCausalLM.from_config(GPT2), LoraConfig(target_modules=["c_attn"])
    if way == "PeftModel":
        source = get_peft_model(plain, lora)
    elif way == "add_adapter":
        plain.add_adapter(lora)
        source = plain
    else:
        get_peft_model(plain, lora).save_pretrained(tmp_path)
        source = tmp_path
    read = db.DiffusionBlocksForCausalLM.from_pretrained if way == "from_pretrained" else db.convert
    with pytest.raises(ValueError, match=r"has adapters \(.*\): merge them into their model first, by merge_and_unload"):
        read(source)


# ---- files


@pytest.mark.parametrize("fault", ["of another block", "without a weight"])
@pytest.mark.parametrize("reader", ["whole", "part", "inspect"])
def test_a_shard_that_is_not_what_the_index_says_is_named(fault, reader, saved, capsys):
    first, second = (saved / SHARD.format(k) for k in (2, 3))
    if fault == "of another block":
        second.write_bytes(first.read_bytes())
    else:
        weights = load_file(second)
        save_file({name: weights[name] for name in sorted(weights)[1:]}, second, metadata={"format": "pt"})
    if reader == "inspect":
        with pytest.raises(SystemExit):
            main(["inspect", str(saved)])
        assert f"{second} lacks " in capsys.readouterr().err
        return
    blocks = {"resident_blocks": [1]} if reader == "part" else {}
    with pytest.raises(OSError, match=rf"{SHARD.format(3)} lacks .*h.2.attn.c_attn.bias, .* says it holds"):
        AutoModelForCausalLM.from_pretrained(saved, **blocks)


@pytest.mark.parametrize("blocks", [{}, {"resident_blocks": [1]}], ids=["whole", "part"])
def test_a_weight_that_neither_file_nor_index_has_is_named(blocks, saved):
    shard, index = saved / SHARD.format(3), saved / "model.safetensors.index.json"
    weights, map_of = load_file(shard), json.loads(index.read_text())
    lost = min(weights)
    del weights[lost], map_of["weight_map"][lost]
    save_file(weights, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(map_of))
    logging.set_verbosity_error()
    with pytest.raises(ValueError, match=f"lacks {lost}, 1 weights in all"):
        AutoModelForCausalLM.from_pretrained(saved, **blocks)


OWN_FILES = ("model_ema.safetensors", "model_best.safetensors", "model.fp16.safetensors", "model-final.safetensors")


def test_weights_of_other_names_are_left_alone(saved):
    """By a save and by a merge; what a save before has numbered goes."""
    for name in (*OWN_FILES, "model-00001-of-00009.safetensors"):
        (saved / name).write_bytes(b"somebody's own")
    db.convert(GPT2, 2).save_pretrained(saved)
    db.convert(GPT2, 2).save_pretrained(saved.parent / "job")
    db.merge_blocks([saved.parent / "job"], saved)
    found = {path.name for path in saved.glob("model*.safetensors")}
    assert found == {*OWN_FILES, *(SHARD.format(k) for k in (1, 2, 3))}


@pytest.mark.parametrize("kind", ["a folder", "not UTF-8"])
def test_whatever_the_readme_is_the_weights_are_saved(kind, saved):
    readme = saved / "README.md"
    readme.unlink()
    readme.mkdir() if kind == "a folder" else readme.write_bytes(b"caf\xe9")
    model = db.convert(GPT2, 2)
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert readme.is_dir() if kind == "a folder" else readme.read_bytes() == b"caf\xe9"


def test_a_state_dict_of_other_names_overwrites_nothing(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="state_dict must have the model's own names, and .*_orig_mod"):
        model.save_pretrained(saved, state_dict=compiled)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


# ---- settings


def test_what_is_set_of_the_config_is_in_the_plain_model(tmp_path):
    model = db.convert(GPT2, 2)
    model.config.pad_token_id, model.config.use_cache = 7, False
    images = db.convert(VIT, 2)
    images.config.id2label = {k: f"class {k}" for k in range(5)}
    images.config.label2id = {f"class {k}": k for k in range(5)}
    for each, read in ((model, AutoModelForCausalLM), (images, AutoModelForImageClassification)):
        each.save_pretrained(tmp_path)
        for again in (each, read.from_pretrained(tmp_path)):
            plain = again.to_plain().config
            if each is model:
                assert (plain.pad_token_id, plain.use_cache) == (7, False)
            else:
                assert plain.id2label[3] == "class 3" and plain.label2id["class 3"] == 3


def test_loading_takes_the_plain_config_s_settings(saved):
    assert AutoModelForCausalLM.from_pretrained(saved, use_cache=False).backbone.config.use_cache is False


def test_a_source_is_loaded_by_the_names_that_transformers_takes(tmp_path):
    plain = AutoModelForCausalLM.from_config(GPT2)
    plain.save_pretrained(tmp_path, variant="fp16")
    model = db.convert(tmp_path, 2, variant="fp16", torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="variant must not be given with source=GPT2LMHeadModel"):
        db.convert(plain, 2, variant="fp16")


@pytest.mark.parametrize("blocks", [{}, {"resident_blocks": [0]}], ids=["whole", "part"])
def test_a_model_that_is_not_there_is_the_hub_s_own_error(blocks):
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        db.DiffusionBlocksForCausalLM.from_pretrained("nobody/nothing", **blocks)
    with pytest.raises(OSError, match="cached files"):
        db.load_block_state_dict("nobody/nothing", 0)


# ---- cards


@pytest.mark.parametrize("name", ["wiki: part #1", "- a list", "plain/name"])
def test_names_of_data_and_models_are_quoted(name, tmp_path):
    model = CASES["gpt2, recommended"].model()
    model.config.training_report, model.config.base_model = {"dataset": name}, name
    text = cards.render(model, tmp_path / 'my "best" model')
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["datasets"] == [name] and metadata["base_model"] == name
    example = text.split("```python")[1].split("```")[0]
    assert r'from_pretrained("my \"best\" model")' in example
    compile(example, "card", "exec")
