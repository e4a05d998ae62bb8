"""The recipes of image classification: sources of models and data, labels new and old; the demo's pictures."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from peft import PeftModel
from recipe_runs import OVERRIDES, QUIET, TRAINING, digits, vit
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTForImageClassification,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes import demo_digits, finetune_image_classification, plots, train_image_classification

pytestmark = pytest.mark.usefixtures("own_cache")
MODEL = ["--num_blocks", "2", "--config_name", "vit", "--config_overrides", OVERRIDES["vit"]]


@pytest.fixture
def data(digits) -> list[str]:
    return split(digits, "")


def split(digits: Path, name: str) -> list[str]:
    return ["--train_file", f"{digits}/{name}train.parquet", "--validation_file", f"{digits}/{name}test.parquet"]


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


def test_end_to_end_takes_as_many_updates_as_a_block(tmp_path, digits, data):
    metrics = train_image_classification.main([*MODEL, *TRAINING, *data, "--end_to_end", "--output_dir", str(tmp_path)])
    assert type(load(tmp_path)) is ViTForImageClassification
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    assert metrics["eval_accuracy"] == accuracy(tmp_path, digits / "test.parquet")


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


def test_image_folder_names_its_labels_and_is_split(tmp_path):
    for number in range(30):
        (folder := tmp_path / "images" / ("zero", "one", "two")[number % 3]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    model = [*MODEL[:-1], OVERRIDES["vit"].replace("num_channels=1", "num_channels=3")]
    options = ["--train_dir", str(tmp_path / "images"), "--validation_split", "0.4", "--max_eval_samples", "5"]
    metrics = train_image_classification.main([*model, *TRAINING, *options, "--output_dir", str(tmp_path)])
    saved = load(tmp_path)
    assert saved.config.id2label == {0: "one", 1: "two", 2: "zero"}
    assert saved.config.training_report["train_examples"] == 18
    assert metrics["eval_accuracy"] * 5 == pytest.approx(round(metrics["eval_accuracy"] * 5))


def test_best_end_to_end_model_is_loaded_whole(tmp_path, data):
    # The first update has rate zero, and the next ones break the model: the first checkpoint is the best.
    rate = ["--learning_rate", "1", "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "1"]
    options = ["--end_to_end", "--load_best_model_at_end", "--output_dir", str(tmp_path), *rate]
    saves = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    train_image_classification.main([*MODEL, *TRAINING, *data, *options, *saves])
    best, saved = load(tmp_path / "checkpoint-1").state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(best[name], saved[name]) for name in best)


# ---- tuned

TUNING = [*QUIET, "--per_device_train_batch_size", "8", "--learning_rate", "5e-3", "--max_steps", "4", "--save_strategy", "no"]


@pytest.mark.parametrize("tuned", [[], ["--lora"]], ids=["whole", "lora"])
def test_a_new_label_set_gets_a_new_classifier(tmp_path, digits, vit, tuned):
    """Though there are as many of them; it is trained whole, and it is saved."""
    options = ["--model", vit, *split(digits, "second-"), *TUNING, "--max_steps", "120", *tuned]
    metrics = finetune_image_classification.main([*options, "--output_dir", str(tmp_path)])
    assert metrics["eval_accuracy"] > 0.5
    old = ViTForImageClassification.from_pretrained(vit)
    if tuned:
        assert not (tmp_path / "model.safetensors").exists()
        new = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(vit), tmp_path).merge_and_unload()
    else:
        new = ViTForImageClassification.from_pretrained(tmp_path)
        assert list(new.config.id2label.values()) == [f"digit {k}" for k in range(5, 10)]
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert F.cosine_similarity(new.classifier.weight.flatten(), old.classifier.weight.flatten(), 0) < 0.5


def test_the_model_s_own_labels_keep_its_classifier(tmp_path, digits, vit):
    options = ["--model", vit, *split(digits, "first-"), *TUNING, "--learning_rate", "0"]
    finetune_image_classification.main([*options, "--output_dir", str(tmp_path)])
    old, new = (ViTForImageClassification.from_pretrained(folder) for folder in (vit, tmp_path))
    assert old.config.id2label == new.config.id2label
    assert all(torch.equal(new.state_dict()[name], weight) for name, weight in old.state_dict().items())


def test_a_new_classifier_of_several_modules(tmp_path, digits, vit):
    """A ResNet's."""
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    AutoImageProcessor.from_pretrained(vit).save_pretrained(tmp_path / "resnet")
    metrics = finetune_image_classification.main(
        [*TUNING, "--model", str(tmp_path / "resnet"), *split(digits, "first-"), "--output_dir", str(tmp_path / "tuned")]
    )
    assert metrics["eval_loss"] < 2


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


def test_picture_of_the_partition(tmp_path):
    plots.plot_noise_partition(db.NoiseSchedule(3, overlap=0.1), tmp_path / "partition.png")
    assert Image.open(tmp_path / "partition.png").size[0] > 1000


def test_pictures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf-diffusionblocks\[recipes\]"):
        plots.plot_noise_partition(db.NoiseSchedule(3), tmp_path / "partition.png")
