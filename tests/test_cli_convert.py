"""`diffusionblocks convert`: what it writes and prints, and that bad input is one line on standard error."""

from __future__ import annotations

import shutil

import pytest
import torch
from cli_runs import blocks_folder, config_file, contents, edit_json, fail, plain_folder
from conftest import randomized
from families import CASES
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedTokenizerFast,
    ViTForImageClassification, ViTImageProcessorPil, pipeline,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import inspect, main


def test_convert_keeps_the_weights_and_prints_the_blocks(plain_model, plain_folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["convert", str(plain_folder), str(out), "--num_blocks", "2"])
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.num_blocks == 2
    for key, value in plain_model.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key
    printed = capsys.readouterr().out
    assert printed == inspect.block_table(inspect.describe(str(out))) + "\n"
    (row,) = [line for line in printed.splitlines() if line.startswith("1 ")]
    assert row.split()[1] == "2-3"
    assert f"{sum(p.numel() for p in model.block_parameters(1)):,}" in row.split()


def test_converted_model_is_one_for_pipelines(plain_config, tmp_path, capsys):
    source, out = str(tmp_path / "colour"), str(tmp_path / "out")
    plain_config.num_channels = 3
    randomized(ViTForImageClassification(plain_config)).save_pretrained(source)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(source)
    main(["convert", source, out])
    assert "note" not in capsys.readouterr().err
    image = Image.new("RGB", (20, 20), "teal")
    found, expected = (pipeline("image-classification", model=folder)(image) for folder in (out, source))
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


def test_a_fresh_dit_shares_nothing_between_its_blocks(tmp_path, capsys):
    """By the recommended preset: there is no such file, and no such row."""
    CASES["dit"].plain().save_pretrained(tmp_path / "dit")
    main(["convert", "--fresh", str(tmp_path / "dit"), str(tmp_path / "out"), "--num_blocks", "2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row][1:] == ["block", "0", "1", "total"]
    assert rows[-1][1] == f"{sum(p.numel() for p in AutoModel.from_pretrained(tmp_path / 'out').parameters()):,}"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_converted_text_model_has_its_tokenizer(family, tmp_path, capsys):
    source, out = str(tmp_path / "plain"), str(tmp_path / "out")
    config = AutoConfig.for_model(family)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 300}
    for field, size in (sizes | ({"num_key_value_heads": 2, "head_dim": 16} if family == "llama" else {})).items():
        setattr(config, field, size)
    config.bos_token_id = config.eos_token_id = 0
    randomized(AutoModelForCausalLM.from_config(config)).save_pretrained(source)
    options = ["--num_blocks", "2"]
    main(["convert", source, out, *options])
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert note.startswith(f"diffusionblocks convert: note: no tokenizer was copied: {source} has no tokenizer")
    assert not (tmp_path / "out" / "tokenizer.json").exists()

    words = Tokenizer(WordLevel({"<end>": 0, "once": 1, "upon": 2, "a": 3, "time": 4}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(source)
    main(["convert", source, out, "--overwrite", *options])
    assert "note" not in capsys.readouterr().err
    write = {folder: pipeline("text-generation", model=folder) for folder in (out, source)}
    told = [each("once upon a", max_new_tokens=8, do_sample=False)[0]["generated_text"] for each in write.values()]
    assert told[0] == told[1] and told[0].startswith("once upon a")


@pytest.mark.parametrize("form", ["file", "folder"])
def test_convert_fresh(form, config_file, tmp_path, capsys):
    source = config_file if form == "file" else config_file.parent
    outs = [tmp_path / name for name in ("a", "b", "other_seed")]
    for out, seed in zip(outs, ("3", "3", "4")):
        main(["convert", "--fresh", str(source), str(out), "--seed", seed])
        (note,) = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
        assert note.startswith("diffusionblocks convert: note: no image processor was copied: Can't load")
        assert not (out / "preprocessor_config.json").exists()
    same, again, other = (AutoModelForImageClassification.from_pretrained(out).state_dict() for out in outs)
    key = "backbone.classifier.weight"
    assert torch.equal(same[key], again[key])
    assert not torch.equal(same[key], other[key])


def test_fresh_takes_the_config_alone(plain_model, plain_folder, tmp_path):
    main(["convert", str(plain_folder), str(tmp_path / "out"), "--fresh"])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert not torch.equal(model.backbone.classifier.weight, plain_model.classifier.weight)


def test_seed_of_what_a_plain_model_lacks(plain_folder, tmp_path):
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        main(["convert", str(plain_folder), str(out), "--preset", "paper", "--seed", "7"])
    first, second = (AutoModelForImageClassification.from_pretrained(out) for out in outs)
    assert torch.equal(first.label_embeddings.table, second.label_embeddings.table)


def test_yaml_and_the_command_line_over_it(plain_folder, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("num_blocks: 2\nlayers_per_block: [1, 3]\nsigma_max: 40.0\npreset: paper\n")
    main(["convert", str(plain_folder), str(tmp_path / "out"), "--config", str(file), "--sigma_max", "20"])
    config = db.DiffusionBlocksConfig.from_pretrained(tmp_path / "out")
    assert (config.num_blocks, config.layers_per_block, config.preset) == (2, [1, 3], "paper")
    assert config.sigma_max == 20


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["--num_blocks", "9"], 1, "num_blocks=9 must be at most the model's 4 layers"),
        (["--preset", "paper", "--sigma_min", "-1"], 1, "sigma_min=-1.0 must be a finite number above 0"),
        (["--sigma_data", "large"], 2, "--sigma-data: invalid float value: 'large'"),
        (["--sigma_max", "9"], 1, "sigma_max=9.0 must be None with preset='recommended'"),
        (["--preset", "both"], 2, "argument --preset: invalid choice: 'both'"),
        (["--num_blocks", "two"], 2, "invalid int value: 'two'"),
        (["--num_blcks", "2"], 2, "--num_blcks"),
        (["--overwrite=perhaps"], 2, "argument --overwrite"),
        (["--config", "nowhere.yaml"], 2, "--config nowhere.yaml: [Errno 2]"),
    ],
)
def test_convert_names_the_bad_option(options, status, named, plain_folder, tmp_path, fail):
    found, line = fail("convert", plain_folder, tmp_path / "out", *options)
    assert line.startswith("diffusionblocks convert: error: ") and named in line
    assert found == status
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "status", "named"),
    [
        ("num_blcks: 2", 2, "'num_blcks' is not an option"),
        ("num_blocks: [", 2, "options.yaml"),
        ("preset: both", 2, "preset='both' must be one of ['recommended', 'paper']"),
        ("num_blocks: 2.5", 2, "invalid int value: '2.5'"),
    ],
)
def test_convert_names_the_bad_line_of_yaml(text, status, named, plain_folder, tmp_path, fail):
    (tmp_path / "options.yaml").write_text(text)
    found, line = fail("convert", plain_folder, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert (found, named in line) == (status, True), line


def test_convert_needs_both_operands(plain_folder, fail):
    assert fail("convert", plain_folder)[1].endswith("required: OUT_DIR")


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_config_without_weights_needs_fresh(form, config_file, tmp_path, fail):
    source = config_file if form == "file" else config_file.parent
    status, line = fail("convert", source, tmp_path / "out")
    assert status == 1
    assert f"SOURCE={source} has no safetensors weights: --fresh" in line


def test_damaged_and_unsupported_sources_are_named(plain_folder, config_file, blocks_folder, tmp_path, fail):
    out = tmp_path / "out"
    (plain_folder / "model.safetensors").write_bytes(b"damaged!")
    assert f"SOURCE={plain_folder}: " in fail("convert", plain_folder, out)[1]
    assert "SOURCE=nobody/nothing: " in fail("convert", "nobody/nothing", out)[1]
    assert "source is a DiffusionBlocks model already" in fail("convert", blocks_folder, out)[1]
    edit_json(config_file, hidden_size="wide")
    assert "'hidden_size' expected int" in fail("convert", "--fresh", config_file, out)[1]
    config_file.write_text('{"model_type": "sam"}')
    assert "model_type='sam' is not supported" in fail("convert", "--fresh", config_file, out)[1]
    config_file.write_text("{")
    assert f"SOURCE={config_file}: " in fail("convert", "--fresh", config_file, out)[1]
    assert not out.exists()


@pytest.mark.parametrize("kind", ["blocks", "plain"])
def test_convert_does_not_overwrite_a_model(kind, plain_folder, blocks_folder, tmp_path, fail):
    out = blocks_folder if kind == "blocks" else shutil.copytree(plain_folder, tmp_path / "other")
    before = contents(out)
    status, line = fail("convert", plain_folder, out)
    assert (status, line) == (
        1, f"diffusionblocks convert: error: OUT_DIR={out} holds a model already: --overwrite replaces it"
    )  # fmt: skip
    assert contents(out) == before

    main(["convert", str(plain_folder), str(out), "--overwrite", "--num_blocks", "4"])
    assert AutoModelForImageClassification.from_pretrained(out).config.num_blocks == 4
    assert len(list(out.glob("*.safetensors"))) == 5


def test_failed_overwrite_leaves_the_old_model(plain_folder, blocks_folder, fail):
    before = contents(blocks_folder)
    fail("convert", plain_folder, blocks_folder, "--overwrite", "--num_blocks", "9")
    assert contents(blocks_folder) == before


def test_convert_refuses_to_replace_its_source_or_a_file(plain_folder, tmp_path, fail):
    before = contents(plain_folder)
    line = fail("convert", plain_folder, plain_folder, "--overwrite")[1]
    assert f"OUT_DIR={plain_folder} must not be SOURCE" in line
    assert contents(plain_folder) == before
    (tmp_path / "file").touch()
    assert f"OUT_DIR={tmp_path / 'file'} is not a folder" in fail("convert", plain_folder, tmp_path / "file")[1]
