"""The recipe that fine-tunes image classifiers: new labels and old, adapters, streaming, errors."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, ViTForImageClassification

from hf_diffusionblocks.recipes import (
    finetune_image_classification, train_image_classification, train_text_classification,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_cache")
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
TRAINING = [*QUIET, "--per_device_train_batch_size", "8", "--learning_rate", "5e-3", "--max_steps", "4"]
CONFIG = "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict[str, list[str]]:
    """Files of the digits 0 to 4, and of 5 to 9, named."""
    folder = tmp_path_factory.mktemp("digits")
    images, targets = load_digits().images, load_digits().target
    files = {}
    for name, low in (("first", 0), ("second", 5)):
        rows = [k for k in range(len(images)) if low <= targets[k] < low + 5][:96]
        table = {"image": [], "label": [f"digit {targets[k]}" for k in rows]}
        for k in rows:
            Image.fromarray((images[k] * 15).astype(np.uint8)).save(buffer := io.BytesIO(), format="png")
            table["image"].append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table(table)
        pyarrow.parquet.write_table(table.slice(0, 64), folder / f"{name}-train.parquet")
        pyarrow.parquet.write_table(table.slice(64), folder / f"{name}-test.parquet")
        files[name] = [
            "--train_file", str(folder / f"{name}-train.parquet"), "--validation_file", str(folder / f"{name}-test.parquet")
        ]  # fmt: skip
    return files


@pytest.fixture(scope="module")
def vit(tmp_path_factory, digits) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    fresh = ["--config_name", "vit", "--config_overrides", f"{CONFIG}, num_channels=1", "--end_to_end"]
    updates = ["--updates_per_block", "3", "--save_strategy", "no"]
    train_image_classification.main([*QUIET, *fresh, *updates, *digits["first"], "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize("tuned", [[], ["--lora"]], ids=["whole", "lora"])
def test_a_new_label_set_gets_a_new_classifier(tmp_path, digits, vit, tuned):
    """Though there are as many of them; it is trained whole, and it is saved."""
    options = ["--model", str(vit), *digits["second"], *TRAINING, "--max_steps", "120", "--save_strategy", "no", *tuned]
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


@pytest.mark.parametrize("tuned", [[], ["--lora"]], ids=["whole", "lora"])
def test_streaming_changes_nothing(tmp_path, digits, vit, tuned):
    """Bit for bit; a streamed run resumes, too."""
    options = ["--model", str(vit), *digits["second"], *TRAINING, "--save_strategy", "steps", "--save_steps", "2", *tuned]
    stream = ["--stream", "--output_dir", str(tmp_path / "streamed")]
    finetune_image_classification.main([*options, "--output_dir", str(tmp_path / "plain")])
    finetune_image_classification.main([*options, *stream])
    name = "adapter_model.safetensors" if tuned else "model.safetensors"
    plain, streamed = (tmp_path / run / name for run in ("plain", "streamed"))
    assert plain.read_bytes() == streamed.read_bytes()
    streamed.unlink()
    resume = ["--resume_from_checkpoint", str(tmp_path / "streamed" / "checkpoint-2")]
    finetune_image_classification.main([*options, *stream, *resume])
    assert plain.read_bytes() == streamed.read_bytes()


def test_the_model_s_own_labels_keep_its_classifier(tmp_path, digits, vit):
    options = ["--model", str(vit), *digits["first"], *TRAINING, "--learning_rate", "0"]
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
        [*TRAINING, "--model", str(tmp_path / "resnet"), *digits["first"], "--output_dir", str(tmp_path / "tuned")]
    )
    assert metrics["eval_loss"] < 2


@pytest.mark.parametrize("recipe", [train_image_classification, train_text_classification])
def test_classes_in_another_order_are_refused(tmp_path, recipe):
    """In files that say the names of their classes, the numbers would mean others."""
    for name, names in (("train", ["no", "yes"]), ("validation", ["yes", "no"])):
        features = Features({"text": Value("string"), "image": datasets.Image(), "label": ClassLabel(names=names)})
        rows = {"text": ["a", "b"], "image": [Image.new("L", (8, 8))] * 2, "label": [0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    files = [f"--{name}_file={tmp_path / name}.parquet" for name in ("train", "validation")]
    kind = ["--config_name", "bert" if recipe is train_text_classification else "vit", "--num_blocks", "2"]
    with pytest.raises(SystemExit, match="must have those of the training data, in their order: \\['no', 'yes'\\]"):
        recipe.main([*QUIET, *kind, *files, "--output_dir", str(tmp_path / "out")])


def test_the_config_that_comes_along_runs(tmp_path, digits, vit):
    config = ["--config", str(Path(finetune_image_classification.__file__).parent / "configs" / "finetune_vit_lora.yaml")]
    options = ["--model", str(vit), *digits["second"], *QUIET, "--output_dir", str(tmp_path)]
    assert finetune_image_classification.main([*config, *options])["eval_loss"] > 0


BAD_INPUTS = {
    "no such model": (["--model", "{nowhere}"], "nowhere"),
    "no such file": (["--train_file", "{nowhere}"], "nowhere' must be an existing file"),
    "no such column": (["--label_column", "x"], "label_column='x' must be a column of the train data"),
    "rank": (["--lora", "--lora_r", "0"], "`r` should be a positive integer value"),
    "nothing to resume": (["--resume_from_checkpoint", "last"], "has no checkpoint"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_line_and_a_failure(tmp_path, digits, vit, options, message):
    options = [option.format(nowhere=tmp_path / "nowhere") for option in options]
    with pytest.raises(SystemExit) as stop:
        finetune_image_classification.main(
            ["--model", str(vit), *digits["second"], *TRAINING, *options, "--output_dir", str(tmp_path)]
        )
    assert stop.value.code.startswith("finetune_image_classification.py: error: ") and message in stop.value.code
    assert "\n" not in stop.value.code


def test_a_new_classifier_that_nothing_would_train_is_refused(tmp_path, digits, vit):
    """By the recipe that trains block by block."""
    options = ["--model_name_or_path", str(vit), "--num_blocks", "2", "--updates_per_block", "1", "--train_shared", "false"]
    with pytest.raises(SystemExit, match="train_shared=False must be True: the labels are new"):
        train_image_classification.main([*options, *digits["second"], *QUIET, "--output_dir", str(tmp_path)])
