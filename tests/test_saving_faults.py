"""What users bring to be converted, loaded and saved: other tensors, adapters, foreign files, names of all kinds."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from families import CASES, TEXT_CONFIGS, VOCAB, WIDTH, three_texts
from process_scenarios import GPT2, LLAMA, VIT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, BitsAndBytesConfig
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.saving import cards

SHARD = "model-0000{}-of-00003.safetensors"


@pytest.fixture
def ids() -> torch.Tensor:
    return three_texts(8)


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


@torch.no_grad()
@pytest.mark.parametrize("case", ["gpt2, recommended", "bert"])
def test_a_head_that_comes_off_later_is_kept(case, tmp_path):
    """Of a model of blocks, whose config says tied: loaded whole, in part, and in a stock model."""
    logging.set_verbosity_error()
    model, inputs = CASES[case].model().eval(), CASES[case].inputs()
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape))
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, expected)
    part = type(model).from_pretrained(tmp_path, resident_blocks=[0, 1])
    assert torch.equal(part(**inputs).logits, expected)
    if model.computes_plain_model:
        for each in (model, again, part):
            assert torch.equal(each.to_plain()(**inputs).logits, expected)


# ---- weights that are no plain numbers


@pytest.mark.parametrize("way", ["convert", "save", "to_plain"])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, "buffers"])
def test_codes_without_their_scales_are_refused(kind, way, tmp_path):
    plain = AutoModelForCausalLM.from_config(GPT2)
    model = plain if way == "convert" else db.convert(plain, 2)
    if kind == "buffers":  # GPTQ's and AWQ's
        model.is_quantized, named = True, "(GPT2LMHeadModel|DiffusionBlocksForCausalLM) is quantised"
    else:
        layer = (model if way == "convert" else model.backbone).transformer.h[0].mlp.c_fc
        layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=kind), requires_grad=False)
        named = rf"mlp.c_fc.weight is quantised \(Tensor, {kind}\)"
    with pytest.raises(ValueError, match=f"{named}: .*full precision"):
        if way == "convert":
            db.convert(model, 2)
        elif way == "save":
            model.save_pretrained(tmp_path / "out")
        else:
            model.to_plain()
    assert not (tmp_path / "out").exists()


def test_blocks_in_eight_bits_are_loaded_to_be_used(tmp_path):
    """As bitsandbytes makes them of stock models; where it is installed."""
    pytest.importorskip("bitsandbytes")
    db.convert(AutoModelForCausalLM.from_config(LLAMA), 2).save_pretrained(tmp_path / "blocks")
    eight_bits = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "blocks", **eight_bits)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    for refused in (lambda: model.save_pretrained(tmp_path / "out"), model.to_plain):
        with pytest.raises(ValueError, match="q_proj.weight is quantised"):
            refused()


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


@pytest.mark.parametrize("reader", ["whole", "part", "block"])
def test_a_shard_of_the_hub_is_checked_too(reader, saved, tmp_path):
    cached = tmp_path / "models--someone--blocks"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    saved.rename(cached / "snapshots" / ("0" * 40))
    shard = cached / "snapshots" / ("0" * 40) / SHARD.format(3)
    weights = load_file(shard)
    lost = min(weights)
    save_file({name: weights[name] for name in weights if name != lost}, shard, metadata={"format": "pt"})
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    logging.set_verbosity_error()
    with pytest.raises((OSError, ValueError), match=f"lacks {lost}.*") as raised:
        if reader == "block":
            db.load_block_state_dict("someone/blocks", 1, **hub)
        else:
            blocks = {"resident_blocks": [1]} if reader == "part" else {}
            AutoModelForCausalLM.from_pretrained("someone/blocks", **hub, **blocks)
    assert shard.name in str(raised.value)


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
def test_whatever_the_readme_is_the_weights_are_saved(kind, saved, caplog):
    readme = saved / "README.md"
    readme.unlink()
    readme.mkdir() if kind == "a folder" else readme.write_bytes(b"caf\xe9")
    model = db.convert(GPT2, 2)
    model.save_pretrained(saved)
    assert f"{readme} cannot be read, and is left as it is: the model is saved without a card" in caplog.text
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


@pytest.mark.parametrize("reader", [AutoModelForCausalLM, db.DiffusionBlocksForCausalLM])
@pytest.mark.parametrize("blocks", [{}, {"resident_blocks": [0]}], ids=["whole", "part"])
def test_loading_takes_what_the_plain_model_takes(reader, blocks, saved):
    """Fields of its config, before the model is built of it, and the older name of dtype."""
    fields = {"use_cache": False, "attn_pdrop": 0.25, "torch_dtype": torch.bfloat16}
    model = reader.from_pretrained(saved, **fields, **blocks)
    assert model.backbone.config.use_cache is False
    assert model.backbone.transformer.h[0].attn.attn_dropout.p == 0.25
    assert model.dtype == torch.bfloat16


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
    model.config.training_report, model.config.base_model = {"dataset": name, "results": {"judge": "a person"}}, name
    text = cards.render(model, tmp_path / 'my "best" model')
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["datasets"] == [name] and metadata["base_model"] == name
    example = text.split("```python")[1].split("```")[0]
    assert r'from_pretrained("my \"best\" model")' in example
    compile(example, "card", "exec")
