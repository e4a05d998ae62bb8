"""The recipe: sources of models and data, errors before any work, resume; the launcher; the demo's pictures."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

import hf_diffusionblocks as db
from refusals import refusal
from hf_diffusionblocks.recipes import plots
from hf_diffusionblocks.recipes import demo_digits, train_image_classification

pytestmark = pytest.mark.usefixtures("own_cache")
RECIPE = Path(train_image_classification.__file__)
OVERRIDES = (
    "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, "
    "num_channels=1"
)
MODEL = ["--num_blocks", "2", "--config_name", "vit", "--config_overrides", OVERRIDES]
TRAINING = [
    "--updates_per_block", "4", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2",
    "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray((image * 15).astype(np.uint8)) for image in load_digits().images[:96]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory, pictures) -> Path:
    """Parquet files as found in the wild: bytes and path of each image, labels as numbers without names."""
    folder = tmp_path_factory.mktemp("digits")
    labels = load_digits().target
    for split, rows in (("train", range(64)), ("test", range(64, 96))):
        images = []
        for row in rows:
            pictures[row].save(buffer := io.BytesIO(), format="png")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({"image": images, "label": labels[rows]})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("image_folder")
    for number, picture in enumerate(pictures[:30]):
        name = ("zero", "one", "two")[number % 3]
        (folder / name).mkdir(exist_ok=True)
        picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def data(digits) -> list[str]:
    return ["--train_file", str(digits / "train.parquet"), "--validation_file", str(digits / "test.parquet")]


def load(folder: Path):
    return AutoModelForImageClassification.from_pretrained(folder)


def accuracy(folder: Path, parquet: Path) -> float:
    """Of a saved model, read as a user would."""
    rows = pyarrow.parquet.read_table(parquet).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    model = load(folder)
    inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        answers = [model.config.id2label[int(k)] for k in model(**inputs).logits.argmax(-1)]
    return float(np.mean([answer == str(row["label"]) for answer, row in zip(answers, rows)]))


def test_diffusionblocks_from_a_fresh_config(tmp_path, digits, data):
    metrics = train_image_classification.main([*MODEL, *TRAINING, *data, "--output_dir", str(tmp_path)])
    model = load(tmp_path)
    assert isinstance(model, db.DiffusionBlocksForImageClassification)
    assert model.config.id2label == {k: str(k) for k in range(10)}
    assert model.config.training_report["updates_per_block"] == [4, 4]
    assert "dataset" not in model.config.training_report  # a file is no hub data set
    assert model.config.training_report["results"]["eval_accuracy"] == metrics["eval_accuracy"]
    assert metrics["eval_accuracy"] == accuracy(tmp_path, digits / "test.parquet")
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_preset(tmp_path, data, preset):
    run = [*MODEL, *TRAINING, *data, "--preset", preset, "--output_dir", str(tmp_path)]
    train_image_classification.main(run)
    assert load(tmp_path).config.preset == preset


def test_end_to_end_takes_as_many_updates_as_a_block(tmp_path, digits, data):
    metrics = train_image_classification.main([*MODEL, *TRAINING, *data, "--end_to_end", "--output_dir", str(tmp_path)])
    assert type(load(tmp_path)) is ViTForImageClassification
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    assert metrics["eval_accuracy"] == accuracy(tmp_path, digits / "test.parquet")


@pytest.mark.parametrize("extra", [[], ["--end_to_end"]], ids=["blocks", "end_to_end"])
def test_streamed_it_saves_the_same_weights(tmp_path, data, extra):
    for name, streamed in (("held", []), ("streamed", ["--stream"])):
        train_image_classification.main([*MODEL, *TRAINING, *data, *extra, *streamed, "--output_dir", str(tmp_path / name)])
    held, streamed = (load(tmp_path / name).state_dict() for name in ("held", "streamed"))
    assert all(torch.equal(weight, streamed[name]) for name, weight in held.items())


@pytest.mark.parametrize("extra", [[], ["--end_to_end"]], ids=["blocks", "end_to_end"])
def test_pretrained_weights_are_kept_and_the_head_is_new(tmp_path, plain_model, data, extra):
    plain_model.save_pretrained(tmp_path / "plain")  # 5 labels, without an image processor
    options = ["--model_name_or_path", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "trained")]
    train_image_classification.main([*options, *TRAINING, *data, *extra, "--num_blocks", "2", "--learning_rate", "0"])
    trained = load(tmp_path / "trained")
    weights = (trained if extra else trained.backbone).state_dict()
    for name, weight in plain_model.state_dict().items():
        if name.startswith("classifier"):
            assert len(weights[name]) == 10
        else:
            assert torch.equal(weights[name], weight), name


def test_image_folder_names_its_labels_and_is_split(tmp_path, image_folder):
    model = [*MODEL[:-1], OVERRIDES.replace("num_channels=1", "num_channels=3")]
    options = ["--train_dir", str(image_folder), "--validation_split", "0.4", "--max_eval_samples", "5"]
    metrics = train_image_classification.main([*model, *TRAINING, *options, "--output_dir", str(tmp_path)])
    saved = load(tmp_path)
    assert saved.config.id2label == {0: "one", 1: "two", 2: "zero"}
    assert saved.config.training_report["train_examples"] == 18
    assert metrics["eval_accuracy"] * 5 == pytest.approx(round(metrics["eval_accuracy"] * 5))


@pytest.mark.parametrize("extra", [[], ["--end_to_end"]], ids=["blocks", "end_to_end"])
def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path, data, extra):
    options = [*MODEL, *TRAINING, *data, *extra, "--save_strategy", "steps", "--save_steps", "0.5"]
    train_image_classification.main([*options, "--output_dir", str(tmp_path / "whole")])
    half = "checkpoint-2" if extra else "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "resumed" / half)
    train_image_classification.main([*options, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "last"])
    whole, resumed = (load(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_best_end_to_end_model_is_loaded_whole(tmp_path, data):
    # The first update has rate zero, and the next ones break the model: the first checkpoint is the best.
    rate = ["--learning_rate", "1", "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "1"]
    options = ["--end_to_end", "--load_best_model_at_end", "--output_dir", str(tmp_path), *rate]
    saves = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    train_image_classification.main([*MODEL, *TRAINING, *data, *options, *saves])
    best, saved = load(tmp_path / "checkpoint-1").state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(best[name], saved[name]) for name in best)


BAD_INPUTS = {
    "no model": (["--train_file", "{train}"], "exactly one of model_name_or_path, config_name"),
    "two models": ([*MODEL, "--model_name_or_path", "x", "--train_file", "{train}"], "not model_name_or_path='x' and"),
    "no data": (MODEL, "exactly one of dataset_name, train_file, train_dir, not none"),
    "two sources": ([*MODEL, "--train_file", "{train}", "--train_dir", "x"], "train_file='{train}' and train_dir='x'"),
    "no such file": ([*MODEL, "--train_file", "x.parquet"], "train_file='x.parquet' must be an existing file"),
    "not parquet": ([*MODEL, "--train_file", __file__], f"train_file='{__file__}' cannot be read: Parquet magic bytes"),
    "no image": (
        [*MODEL, "--train_file", "{hole}", "--validation_split", "0"],
        "image_column='image' of row 3 of the train data is no image: 'NoneType'",
    ),
    "no such column": ([*MODEL, "--train_file", "{train}", "--label_column", "x"], "must be a column of"),
    "not images": ([*MODEL, "--train_file", "{train}", "--image_column", "label"], "'label' must hold images"),
    "bad override": ([*MODEL[:-1], "depth=2", "--train_file", "{train}"], "config_overrides='depth=2' must be"),
    "width zero": ([*MODEL[:-1], "hidden_size=0", "--train_file", "{train}"], "makes no model that runs: ZeroDivision"),
    "no such activation": (
        [*MODEL[:-1], "hidden_act=foo", "--end_to_end", "--train_file", "{train}"],
        "config_overrides='hidden_act=foo' makes no model that runs: KeyError: 'foo'",
    ),
    "patch above image": (
        [*MODEL[:-1], "image_size=4, patch_size=16", "--train_file", "{train}"],
        "makes no model that runs: RuntimeError",
    ),
    "text model": (
        ["--num_blocks", "2", "--config_name", "llama", "--train_file", "{train}"],
        "task='image-classification' must be 'fill-mask', 'text-generation', 'text-classification' for model_type='llama'",
    ),
    "bad field": ([*MODEL, "--train_file", "{train}", "--num_blocks", "3"], "num_blocks=3 must be at most"),
    "bad share": ([*MODEL, "--train_file", "{train}", "--validation_split", "1"], "validation_split=1.0 must be"),
    "nothing to resume": ([*MODEL, "--train_file", "{train}", "--resume_from_checkpoint", "last"], "no checkpoint"),
    "unknown option": ([*MODEL, "--train_file", "{train}", "--epochs", "3"], "--epochs"),
    "unknown key": (["--config", "{yaml}"], "'num_block' is not an option"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_line_and_a_failure(tmp_path, digits, capsys, options, message):
    (tmp_path / "options.yaml").write_text("num_block: 3\n")
    table = pyarrow.parquet.read_table(digits / "train.parquet").slice(0, 3)
    hole = pyarrow.table({"image": [*table["image"].to_pylist(), None], "label": [0, 1, 0, 1]})
    pyarrow.parquet.write_table(hole, tmp_path / "hole.parquet")
    names = {"train": digits / "train.parquet", "hole": tmp_path / "hole.parquet", "yaml": tmp_path / "options.yaml"}
    options = [option.format(**names) for option in options]
    given = [*options, "--output_dir", str(tmp_path / "out")]
    assert message.format(**names) in refusal(train_image_classification.main, given, "train_image_classification.py", capsys)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train_image_classification.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    one_of_each = ("config_overrides", "label_column", "local_head_layers", "updates_per_block")
    assert all(f"--{name} " in text for name in one_of_each)


def test_accelerate_launch_with_a_yaml_file(tmp_path, data):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"config_name: vit\nconfig_overrides: >-\n  {OVERRIDES}\nnum_blocks: 2\npreset: paper\n"
        "updates_per_block: 9\nper_device_train_batch_size: 8\n"
        "learning_rate: 1.0e-3\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    options = ["--config", str(config), *data, "--updates_per_block", "3", "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(RECIPE), *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "block 1: layers 1-1" in done.stderr
    saved = load(tmp_path / "out")
    assert saved.config.preset == "paper"
    assert saved.config.training_report["updates_per_block"] == [3, 3]  # the command line wins


# ---- the demo and its pictures


def test_demo_shows_the_end_of_a_failed_log(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("what went wrong\n")
    with pytest.raises(SystemExit, match="what went wrong"):
        demo_digits.run([sys.executable, "-c", "raise SystemExit(3)"], log)


def test_demo_writes_the_same_split_every_time(tmp_path):
    labels = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        demo_digits.write_data(tmp_path / name)
        tables = [pyarrow.parquet.read_table(tmp_path / name / f"{split}.parquet") for split in ("train", "test")]
        assert [len(table) for table in tables] == [1437, 360]
        labels.append([table["label"].to_pylist() for table in tables])
    assert labels[0] == labels[1]


@pytest.mark.parametrize("num_blocks", [1, 3, 8])
def test_picture_of_the_partition(tmp_path, num_blocks):
    plots.plot_noise_partition(db.NoiseSchedule(num_blocks, overlap=0.1), tmp_path / "partition.png")
    assert Image.open(tmp_path / "partition.png").size[0] > 1000


def test_pictures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf-diffusionblocks\[recipes\]"):
        plots.plot_noise_partition(db.NoiseSchedule(3), tmp_path / "partition.png")
