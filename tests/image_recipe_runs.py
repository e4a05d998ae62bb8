"""What the recipe that fine-tunes image models runs on: tiny pipelines, captioned images, caches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import PIPELINES, save_pipeline

from hf_diffusionblocks.recipes import finetune_image_model as recipe, image_trainer

FAMILIES = ["flux", "sd3", "qwen", "sana"]
CAPTIONS = ["a red cat", "a dog in the park", "blue"]
TRAINING = [
    "--dtype", "float32", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu",
    "--disable_tqdm", "true", "--save_strategy", "no",
]  # fmt: skip
STEPS = [
    "--max_steps", "5", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--weight_decay", "0.1",
    "--ema_decay", "0.9", "--caption_dropout", "0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Saved pipelines."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: save_pipeline(name, root / name) for name in PIPELINES}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> str:
    """Seven images of three shapes."""
    folder, drawn, rows = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for number in range(7):
        shape = [(64, 64), (64, 128), (128, 64)][number % 3]
        Image.fromarray(drawn.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"{CAPTIONS[number % 3]} {number}", "label": 100 * number})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def options(folders, captioned, tmp_path_factory):
    """Options for a family, whose runs share a cache."""
    caches = tmp_path_factory.mktemp("caches")
    sizes = {"sana": ["--resolution", "64", "--bucket_step", "32"], "dit": ["--resolution", "16", "--caption_column", "label"]}

    def of(name: str) -> list[str]:
        size = sizes.get(name, ["--resolution", "32"])
        size = size if "--bucket_step" in size else [*size, "--bucket_step", "8"]
        length = [] if name == "dit" else ["--max_sequence_length", "300" if name == "qwen" else "40"]
        given = ["--model", folders[name], "--data", captioned, "--cache_dir", str(caches / name)]
        return [*given, *size, *length, *TRAINING, "--sample_steps", "2"]

    return of


@pytest.fixture
def trainers(monkeypatch) -> list:
    """The trainers of the runs, and what they were at step 0."""
    made, train = [], recipe.common.train

    def noted(trainer, resume_from):
        trainer.images_at_start = [each.images() for each in samples_of(trainer)]
        made.append(trainer)
        return train(trainer, resume_from)

    monkeypatch.setattr(recipe.common, "train", noted)
    return made


def samples_of(trainer) -> list[image_trainer.Samples]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, image_trainer.Samples)]
