"""The command `diffusionblocks`: what every verb does, and that bad input is one line on standard error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomized
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedTokenizerFast,
    ViTForImageClassification, ViTImageProcessorPil, pipeline,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import cards
from hf_diffusionblocks.cli import VERBS, convert, inspect, main, train

INDEX = "model.safetensors.index.json"


@pytest.fixture
def plain_folder(plain_model, tmp_path) -> Path:
    plain_model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def config_file(plain_config, tmp_path) -> Path:
    plain_config.architectures = ["ViTForImageClassification"]
    plain_config.save_pretrained(tmp_path / "config_alone")
    return tmp_path / "config_alone" / "config.json"


@pytest.fixture
def saved(model, tmp_path):
    """A saved model of each formulation, and its folder."""
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.fixture
def blocks_folder(plain_model, tmp_path) -> Path:
    """A saved model of two blocks."""
    randomized(db.convert(plain_model, num_blocks=2, preset="paper")).save_pretrained(tmp_path / "blocks")
    return tmp_path / "blocks"


@pytest.fixture
def fail(capsys):
    """Run a command that must fail; returns its status and its one line on standard error."""

    def run(*args) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        (line,) = capsys.readouterr().err.splitlines()
        return exit_.value.code, line

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- the command


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_lists_every_verb_with_a_line(args, capsys):
    main(args)
    lines = capsys.readouterr().out.splitlines()
    for verb, line in VERBS.items():
        assert any(verb in printed and line in printed for printed in lines)


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("convert", ["SOURCE", "OUT_DIR", "--config FILE.yaml", "--fresh", "--seed", "--overwrite", "--sigma_max"]),
        ("train", ["TASK", "--accelerate_config", "--config FILE.yaml", "tasks: causal-lm, image-classification"]),
        ("inspect", ["PATH_OR_ID", "--config FILE.yaml", "--json"]),
        ("generate", ["FOLDER", "--config FILE.yaml", "--seed", "--offload", "--class_labels", "--output", "--prompt"]),
        ("merge", ["OUT_DIR", "JOB...", "--overwrite"]),
        ("estimate", ["--model", "--batch_size", "--sequence_length", "--dtype", "autocast", "--budget", "--num_blocks"]),
        ("card", ["FOLDER", "--config FILE.yaml", "--stdout", "--force"]),
    ],
)
def test_every_verb_has_help(verb, expected, capsys):
    try:
        main([verb, "--help"])
    except SystemExit as exit_:
        assert exit_.code == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in expected), printed


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"diffusionblocks {db.__version__}\n"


@pytest.mark.parametrize(("args", "named"), [([], "a verb is missing"), (["convrt", "a"], "'convrt' is not a verb")])
def test_no_such_verb(args, named, fail):
    status, line = fail(*args)
    assert status == 2
    assert line == f"diffusionblocks: error: {named}; verbs are convert, train, generate, merge, estimate, inspect, card"


def test_a_bug_keeps_its_traceback(plain_folder, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(convert, "convert", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["convert", str(plain_folder), str(tmp_path / "out")])


def test_installed_command(plain_folder):
    command = Path(sys.executable).with_name("diffusionblocks")
    done = subprocess.run([command, "inspect", plain_folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"diffusionblocks inspect: error: {plain_folder} is not a DiffusionBlocks model")


# ---- convert


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
    main(["convert", source, out, "--denoiser", "factorized", "--context", "carried"])
    assert "note" not in capsys.readouterr().err
    image = Image.new("RGB", (20, 20), "teal")
    found, expected = (pipeline("image-classification", model=folder)(image) for folder in (out, source))
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_converted_text_model_has_its_tokenizer(family, tmp_path, capsys):
    source, out = str(tmp_path / "plain"), str(tmp_path / "out")
    config = AutoConfig.for_model(family)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 300}
    for field, size in (sizes | ({"num_key_value_heads": 2, "head_dim": 16} if family == "llama" else {})).items():
        setattr(config, field, size)
    config.bos_token_id = config.eos_token_id = 0
    randomized(AutoModelForCausalLM.from_config(config)).save_pretrained(source)
    options = ["--num_blocks", "2", "--denoiser", "factorized", "--context", "carried"]
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
        main(["convert", str(plain_folder), str(out), "--seed", "7"])
    first, second = (AutoModelForImageClassification.from_pretrained(out) for out in outs)
    assert torch.equal(first.label_embeddings.table, second.label_embeddings.table)


def test_yaml_and_the_command_line_over_it(plain_folder, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("num_blocks: 2\nlayers_per_block: [1, 3]\nsigma_max: 40.0\ndenoiser: factorized\n")
    main(["convert", str(plain_folder), str(tmp_path / "out"), "--config", str(file), "--sigma_max", "20"])
    config = db.DiffusionBlocksConfig.from_pretrained(tmp_path / "out")
    assert (config.num_blocks, config.layers_per_block, config.denoiser) == (2, [1, 3], "factorized")
    assert config.sigma_max == 20


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["--num_blocks", "9"], 1, "num_blocks=9 must be at most the model's 4 layers"),
        (["--sigma_min", "-1"], 1, "sigma_min=-1.0 must be above 0"),
        (["--sigma_data", "large"], 1, "sigma_data='large' must be a number, or 'auto'"),
        (["--denoiser", "factorized", "--readout", "edm"], 1, "readout='edm' must be 'posterior'"),
        (["--denoiser", "both"], 2, "argument --denoiser: invalid choice: 'both'"),
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
        ("denoiser: both", 2, "denoiser='both' must be one of ['joint', 'factorized']"),
        ("num_blocks: 2.5", 1, "num_blocks=2.5 must be a whole number from 1"),
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
    config_file.write_text('{"model_type": "t5"}')
    assert "model_type='t5' is not supported" in fail("convert", "--fresh", config_file, out)[1]
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


# ---- inspect


def check_description(found: dict, model, folder: Path) -> None:
    schedule = model.noise_schedule
    for k, block in enumerate(found["blocks"]):
        assert block["block"] == k
        assert block["layers"] == list(model.block_layers(k))
        assert block["sigma"] == list(schedule.interval(k))
        assert block["training_sigma"] == list(schedule.interval(k, schedule.overlap))
        assert block["parameters"] == sum(p.numel() for p in model.block_parameters(k))
        assert block["bytes"] == (folder / block["file"]).stat().st_size
    assert found["shared"]["parameters"] == sum(p.numel() for p in model.shared_parameters())
    files = {part["file"] for part in (found["shared"], *found["blocks"])}
    assert files == {path.name for path in folder.glob("*.safetensors")}


def test_inspect_json_is_the_models_own(saved, capsys):
    model, folder = saved
    main(["inspect", "--json", str(folder)])
    found = json.loads(capsys.readouterr().out)
    check_description(found, model, folder)
    assert (found["num_blocks"], found["num_hidden_layers"], found["source_model_type"]) == (2, 4, "vit")
    assert found["task"] == "image-classification"
    formulation = found["formulation"]
    for name in ("denoiser", "context", "readout", "readout_layers", "sigma_min", "sampler"):
        assert formulation[name] == getattr(model.config, name)
    assert formulation["overlap"] == model.noise_schedule.overlap
    assert formulation["sigma_data"] == model.sigma_data
    assert formulation["num_inference_steps"] == 2
    assert found["training_report"] is None


def test_inspect_says_what_auto_stands_for(plain_model, tmp_path, capsys):
    model = db.convert(plain_model, num_blocks=4, sigma_data="auto", overlap=0.2, num_inference_steps=7, preset="paper")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "options.yaml").write_text("json: true")
    main(["inspect", str(tmp_path / "model"), "--config", str(tmp_path / "options.yaml")])
    found = json.loads(capsys.readouterr().out)
    check_description(found, model, tmp_path / "model")
    formulation = found["formulation"]
    assert formulation["sigma_data"] == pytest.approx(32**-0.5)
    assert (formulation["overlap"], formulation["num_inference_steps"]) == (0.2, 7)


def test_inspect_prints_table_formulation_and_report(plain_model, tmp_path, capsys):
    model = db.convert(plain_model, num_blocks=2, preset="paper")
    model.config.training_report = {"results": {"eval_accuracy": 0.5}, "steps": 12}
    model.save_pretrained(tmp_path / "model")
    main(["inspect", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert "vit for image-classification, 4 layers in 2 blocks" in printed
    (shared,) = [line.split() for line in printed.splitlines() if line.startswith("shared")]
    size = (tmp_path / "model" / "model-00001-of-00003.safetensors").stat().st_size
    assert shared[1:] == [
        f"{sum(p.numel() for p in model.shared_parameters()):,}", "model-00001-of-00003.safetensors", f"{size:,}"
    ]  # fmt: skip
    assert "(0.3012, 80]" in printed and "(0.2278, 80]" in printed
    assert "  denoiser: joint\n" in printed
    assert "training report:\n  results:\n    eval_accuracy: 0.5\n  steps: 12\n" in printed


def test_inspect_loads_no_weights(blocks_folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    main(["inspect", str(blocks_folder)])
    assert "not trained yet" in capsys.readouterr().out


def test_inspect_fetches_headers_alone_from_the_hub(blocks_folder, monkeypatch, capsys):
    main(["inspect", "--json", str(blocks_folder)])
    local = json.loads(capsys.readouterr().out)

    class Hub:
        def parse_safetensors_file_metadata(self, repo_id, file):
            return inspect.parse_local_safetensors_file_metadata(blocks_folder / file)

    class Metadata:
        size = 1234

    config = db.DiffusionBlocksConfig.from_pretrained(blocks_folder)
    monkeypatch.setattr(inspect.AutoConfig, "from_pretrained", lambda source: config)
    monkeypatch.setattr(inspect, "cached_file", lambda source, file: str(blocks_folder / file))
    monkeypatch.setattr(inspect, "HfApi", Hub)
    monkeypatch.setattr(inspect, "get_hf_file_metadata", lambda url: Metadata)
    main(["inspect", "--json", "someone/blocks"])
    remote = json.loads(capsys.readouterr().out)
    for here, there in zip([local["shared"], *local["blocks"]], [remote["shared"], *remote["blocks"]]):
        assert there == here | {"bytes": 1234}


def test_inspect_without_the_hub_names_model_and_file(blocks_folder, monkeypatch, fail):
    assert "nobody/nothing: " in fail("inspect", "nobody/nothing")[1]
    config = db.DiffusionBlocksConfig.from_pretrained(blocks_folder)
    monkeypatch.setattr(inspect.AutoConfig, "from_pretrained", lambda source: config)
    monkeypatch.setattr(inspect, "cached_file", lambda source, file: str(blocks_folder / file))
    line = fail("inspect", "nobody/nothing")[1]  # the config is in the cache, its weights are not
    assert "nobody/nothing: the header of model-00001-of-00003.safetensors cannot be read: " in line


def test_inspect_names_the_truncated_shard(blocks_folder, fail):
    shard = blocks_folder / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    status, line = fail("inspect", blocks_folder)
    assert (status, f"{shard} is truncated" in line) == (1, True), line
    shard.unlink()
    assert f"{shard} is missing" in fail("inspect", blocks_folder)[1]


def test_inspect_names_what_is_wrong_with_config_or_index(blocks_folder, fail):
    index, config = blocks_folder / INDEX, blocks_folder / "config.json"
    edit_json(config, num_blocks=1)
    assert f"{index} maps 0, 1, shared, but the config says num_blocks=1" in fail("inspect", blocks_folder)[1]
    edit_json(config, num_blocks=2, denoiser="both")
    assert "denoiser='both' must be one of" in fail("inspect", blocks_folder)[1]
    edit_json(config, denoiser="joint")
    index.write_text('{"weight_map": {}, "metadata": {}}')
    assert f"{index} does not map blocks to files" in fail("inspect", blocks_folder)[1]
    index.write_text("{")
    assert f"{index} is damaged" in fail("inspect", blocks_folder)[1]
    index.unlink()
    assert INDEX in fail("inspect", blocks_folder)[1]
    config.write_text("{")
    assert str(blocks_folder) in fail("inspect", blocks_folder)[1]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_inspect_wants_a_diffusionblocks_model(form, plain_folder, fail):
    source = plain_folder if form == "folder" else plain_folder / "config.json"
    status, line = fail("inspect", source)
    assert status == 1
    assert f"{source} is not a DiffusionBlocks model (model_type='vit')" in line


# ---- card


def test_card_is_the_one_of_the_save(saved, capsys):
    model, folder = saved
    card = folder / "README.md"
    expected = card.read_text()
    card.unlink()
    main(["card", str(folder)])
    assert card.read_text() == expected == cards.render(model, folder)
    assert capsys.readouterr().out == f"{card}: written\n"
    edit_json(folder / "config.json", training_report={"steps": 77})
    main(["card", str(folder)])
    assert "optimizer steps: 77" in card.read_text()


def test_card_to_stdout_writes_nothing(blocks_folder, capsys):
    before = contents(blocks_folder)
    main(["card", "--stdout", str(blocks_folder)])
    assert capsys.readouterr().out.strip() == (blocks_folder / "README.md").read_text().strip()
    assert contents(blocks_folder) == before


def test_card_of_a_person_is_kept_unless_forced(blocks_folder, capsys):
    card = blocks_folder / "README.md"
    card.write_text("# Mine\n")
    main(["card", str(blocks_folder)])
    assert card.read_text() == "# Mine\n"
    assert capsys.readouterr().out == f"{card}: kept, a person wrote or edited it; --force replaces it\n"
    main(["card", "--force", str(blocks_folder)])
    assert "## Blocks" in card.read_text()


@pytest.mark.parametrize("options", [[], ["--force"]])
@pytest.mark.parametrize("failing", ["write", "rename"])
def test_failed_card_leaves_the_old_one(failing, options, blocks_folder, monkeypatch, fail):
    before = contents(blocks_folder)

    def half(path, text):
        with open(path, "w") as stream:
            stream.write(text[:10])
        raise OSError("disk full")

    def refuse(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(Path, "write_text", half)
        else:
            patch.setattr(os, "replace", refuse)
        assert fail("card", blocks_folder, *options) == (1, "diffusionblocks card: error: disk full")
    assert contents(blocks_folder) == before


def test_card_wants_a_diffusionblocks_folder(plain_folder, tmp_path, fail):
    assert f"FOLDER={tmp_path / 'nowhere'} is not a folder" in fail("card", tmp_path / "nowhere")[1]
    status, line = fail("card", plain_folder)
    assert (status, "is not a DiffusionBlocks model" in line) == (1, True)
    assert not (plain_folder / "README.md").exists()


# ---- train

FAKE_RECIPE = """
import json, os, sys
json.dump([sys.argv[1:], os.environ["ACCELERATE_MIXED_PRECISION"]], open(os.environ["RECIPE_SAW"], "w"))
if "--killed" in sys.argv:
    os.kill(os.getpid(), 9)
sys.exit(int(os.environ.get("RECIPE_STATUS", 0)))
"""


@pytest.fixture
def recipe_saw(tmp_path, monkeypatch):
    """A folder of recipes with one that does nothing; returns what it was last run with."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train_fake_task.py").write_text(FAKE_RECIPE)
    (tmp_path / "recipes" / "other.py").touch()
    monkeypatch.setattr(train, "files", lambda package: tmp_path / "recipes")
    monkeypatch.setenv("RECIPE_SAW", str(tmp_path / "saw.json"))
    return lambda: json.loads((tmp_path / "saw.json").read_text())


def test_train_passes_everything_on(recipe_saw):
    main(["train", "fake-task", "--config", "x.yaml", "--output_dir", "out", "--num_processes", "3"])
    assert recipe_saw()[0] == ["--config", "x.yaml", "--output_dir", "out", "--num_processes", "3"]
    main(["train", "fake-task", "--help"])
    assert recipe_saw()[0] == ["--help"]


def test_what_precedes_the_task_is_for_accelerate(recipe_saw):
    main(["train", "--mixed_precision", "bf16", "--num_processes=1", "fake-task", "--a", "1"])
    assert recipe_saw() == [["--a", "1"], "bf16"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_accelerate_config(where, recipe_saw, tmp_path):
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\n"
    )
    option = ["--accelerate_config", str(file)]
    main(["train", *(option if where == "before" else []), "fake-task", "--a", *(option if where == "after" else [])])
    assert recipe_saw() == [["--a"], "bf16"]


@pytest.mark.parametrize(("option", "status"), [("--fails", 3), ("--killed", 128 + 9)])
def test_exit_status_is_the_recipes(option, status, recipe_saw, monkeypatch):
    monkeypatch.setenv("RECIPE_STATUS", "3")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "fake-task", option])
    assert exit_.value.code == status
    assert recipe_saw()[0] == [option]


@pytest.mark.parametrize(
    ("args", "status", "named"),
    [
        (["no-task", "--a"], 1, "TASK='no-task' must be one of fake-task"),
        (["other"], 1, "TASK='other' must be one of fake-task"),
        ([], 2, "required: TASK"),
        (["--num_processes", "2"], 2, "required: TASK"),
        (["--config", "x.yaml", "fake-task"], 2, "unrecognized arguments: --config"),
        (["--num_processes", "two", "fake-task"], 2, "invalid int value: 'two'"),
        (["--accelerate_config", "nowhere.yaml", "fake-task"], 1, "`nowhere.yaml` does not exist"),
        (["fake-task", "--accelerate_config"], 2, "argument --accelerate_config: expected one argument"),
    ],
)
def test_train_names_what_is_wrong(args, status, named, recipe_saw, fail):
    found, line = fail("train", *args)
    assert line.startswith("diffusionblocks train: error: ") and named in line
    assert found == status


def test_recipes_are_found_in_the_package():
    recipes = train.find_recipes()
    tasks = ["causal-lm", "image-classification"]
    assert list(recipes) == [*tasks, "image-generation", "masked-lm", *(f"finetune-{task}" for task in tasks)]
    for task, recipe in recipes.items():
        name = f"{task.replace('-', '_')}.py"
        assert Path(recipe).name == (name if name.startswith("finetune_") else f"train_{name}") and Path(recipe).is_file()
