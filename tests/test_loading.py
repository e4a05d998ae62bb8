"""What `convert` and `from_pretrained` pass on of what says where on the Hub to find a model, and how to build it."""

from __future__ import annotations

import pytest
import torch
from conftest import randomized
from process_scenarios import GPT2, VIT
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, GPT2LMHeadModel, PreTrainedConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import resident, shards
from hf_diffusionblocks.tasks import backbone_for

HUB = {
    "revision": "refs/pr/1", "token": "hf_secret", "cache_dir": "/somewhere", "force_download": True,
    "local_files_only": True,
}  # fmt: skip


@pytest.fixture(params=[GPT2, VIT], ids=["text", "images"])
def config(request):
    return request.param


@pytest.fixture
def plain(config):
    torch.manual_seed(0)
    return randomized(backbone_for(config).plain_class(config)).eval()


@pytest.fixture
def gpt2(tmp_path):
    """A folder of a stock GPT-2."""
    GPT2LMHeadModel(GPT2).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_convert_passes_on_where_and_how_to_load(gpt2, monkeypatch):
    """To the config and the model, of a hub id; dtype and attention to the model alone."""
    config, model, seen = AutoConfig.from_pretrained(gpt2), GPT2LMHeadModel.from_pretrained(gpt2), {}

    def read_config(source, **kwargs):
        seen["config"] = (source, kwargs)
        return config

    def read_fields(cls, source, **kwargs):
        seen["fields"] = (source, kwargs)
        return config.to_dict(), {}

    def read_model(cls, source, **kwargs):
        seen["model"] = (source, kwargs)
        return model

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(read_fields))
    monkeypatch.setattr(AutoConfig, "from_pretrained", read_config)
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", classmethod(read_model))
    hub = {**HUB, "subfolder": "inner"}
    db.convert("someone/gpt2", 2, **hub, dtype="bfloat16", attn_implementation="eager")
    assert seen["fields"] == seen["config"] == ("someone/gpt2", hub)
    built = {"dtype": "bfloat16", "attn_implementation": "eager", "use_safetensors": True, "config": config}
    assert seen["model"] == ("someone/gpt2", {**hub, **built})


def test_convert_from_a_subfolder_in_another_dtype(gpt2):
    source = GPT2LMHeadModel.from_pretrained(gpt2)
    for blocks in (None, [1]):
        model = db.convert(
            gpt2.parent, 2, resident_blocks=blocks, subfolder="gpt2", dtype=torch.bfloat16, attn_implementation="eager"
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.backbone.config._attn_implementation == "eager"
        weight = model.backbone.transformer.h[2].mlp.c_fc.weight
        assert torch.equal(weight, source.transformer.h[2].mlp.c_fc.weight.bfloat16())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_config_or_a_model_is_built_in_another_dtype(config, plain, dtype):
    for source in (config, plain):
        model = db.convert(source, 2, dtype=dtype, attn_implementation="eager")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.backbone.config._attn_implementation == "eager"
    assert plain.dtype == torch.float32
    half = type(config)(**{**config.to_dict(), "dtype": "float16"})
    for source in (half, plain.half()):
        assert db.convert(source, 2, dtype="auto").dtype == torch.float16


@pytest.mark.parametrize("name", [*HUB, "subfolder"])
def test_what_is_for_the_hub_is_refused_elsewhere(name, config, plain):
    for source in (config, plain):
        message = f"^{name} must not be given with source={type(source).__name__}: for a hub id or folder only"
        with pytest.raises(ValueError, match=message):
            db.convert(source, 2, **{name: HUB.get(name, "inner")})
        db.convert(source, 2, **{name: None})


@pytest.mark.parametrize("fields", [{"trust_remote_code": True}, {"device_map": "auto"}])
def test_what_convert_does_not_take_is_refused_by_name(fields, gpt2):
    (name,) = fields
    for source in (GPT2, str(gpt2)):
        with pytest.raises(ValueError, match=f"{name}=.* must not be given"):
            db.convert(source, 2, **fields)


@pytest.mark.parametrize("resident", [None, [0]])
def test_a_saved_model_is_loaded_from_a_subfolder(resident, plain, tmp_path):
    """By every name of it; a damaged shard is named there, too."""
    made = db.convert(plain, 2)
    made.save_pretrained(tmp_path / "inner")
    auto = AutoModelForCausalLM if made.can_generate() else AutoModelForImageClassification
    for loader in (type(made), auto):
        model = loader.from_pretrained(
            tmp_path, subfolder="inner", resident_blocks=resident, dtype=torch.bfloat16, attn_implementation="eager"
        )
        assert model.resident_blocks == (resident or [0, 1])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.backbone.config._attn_implementation == "eager"
    shard = tmp_path / "inner" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{shard.name} is truncated"):
        type(made).from_pretrained(tmp_path, subfolder="inner", resident_blocks=resident)


@pytest.mark.parametrize("resident", [None, [0]])
def test_a_folder_of_a_plain_model_is_called_that(resident, gpt2):
    with pytest.raises(ValueError, match="model_type='gpt2' must be 'diffusionblocks': .*plain model, convert"):
        db.DiffusionBlocksForCausalLM.from_pretrained(gpt2, resident_blocks=resident)


def test_a_part_is_read_where_the_hub_arguments_say(gpt2, tmp_path, monkeypatch):
    """Its config, every file of its blocks and its generation settings."""
    db.convert(gpt2, 2).save_pretrained(tmp_path / "saved")
    asked, cached_file = [], shards.cached_file

    def watched(source, file, **kwargs):
        asked.append((file, {name: value for name, value in kwargs.items() if name in HUB}))
        return cached_file(source, file)

    monkeypatch.setattr(shards, "cached_file", watched)
    monkeypatch.setattr(resident, "cached_file", watched)
    hub = {"revision": "v1", "token": "hf_secret", "local_files_only": True}
    db.DiffusionBlocksForCausalLM.from_pretrained(tmp_path / "saved", resident_blocks=[1], **hub)
    files = {file for file, _ in asked}
    assert {"generation_config.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"} <= files
    assert all(kwargs == hub for _, kwargs in asked)


def test_device_map_is_for_whole_models(gpt2, tmp_path):
    made = db.convert(gpt2, 2).eval()
    made.save_pretrained(tmp_path / "saved")
    inputs = torch.randint(64, (3, 12))
    for device_map in ("cpu", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map=device_map)
        with torch.no_grad():
            assert torch.equal(model(inputs).logits, made(inputs).logits)
    with pytest.raises(ValueError, match=r"device_map cannot be combined with resident_blocks=\[0\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu", resident_blocks=[0])


def test_what_stands_for_a_layer_has_what_its_class_says_of_its_kind():
    """Inkling's layers say there which mask they want."""

    class Layer(torch.nn.Linear):
        attention_type = "sliding_attention"

    assert resident.NotLoaded(Layer(2, 2)).attention_type == "sliding_attention"
