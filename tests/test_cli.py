"""The command `diffusionblocks`: its help, its failures, and recipes that it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import fail, plain_folder
from transformers import TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import VERBS, convert, main, train
from hf_diffusionblocks.cli.arguments import parse

# ---- the verbs


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
        ("generate", ["FOLDER", "--config FILE.yaml", "--seed", "--stream", "--class_labels", "--output", "--prompt"]),
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
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\n")
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
    tasks = ["causal-lm", "image-classification", "image-generation", "masked-lm", "text-classification"]
    tuning = ["", "-block-diffusion", "-image-classification", "-image-model", "-masked-lm"]
    assert list(recipes) == [*tasks, *(f"finetune{each}" for each in tuning)]
    for task, recipe in recipes.items():
        name = f"{task.replace('-', '_')}.py"
        assert Path(recipe).name == (name if name.startswith("finetune") else f"train_{name}") and Path(recipe).is_file()


def test_yaml_s_no_is_a_choice_and_its_null_is_nothing(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("save_strategy: no\nmax_steps: null\nseed:\noutput_dir: out\n")
    (args,) = parse([TrainingArguments], ["--config", str(file)])
    assert (args.save_strategy, args.max_steps, args.seed) == ("no", -1, 42)
