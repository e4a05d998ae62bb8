"""What all recipes keep: streamed or resumed they end with the same weights, jobs of a block are merged, their configs run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recipe_runs import RUNS, digits, files, folder, masked, model, places, run, vit, writer
from transformers import AutoConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes import common
from hf_diffusionblocks.saving import shards
from hf_diffusionblocks.tasks import TASKS

pytestmark = pytest.mark.usefixtures("own_cache")
WAYS = {
    **{task: (task,) for task in RUNS},
    "causal-lm, end to end": ("causal-lm", "--end_to_end"),
    "causal-lm, the paper's": ("causal-lm", "--preset", "paper"),
    "image-classification, end to end": ("image-classification", "--end_to_end"),
    "finetune, lora": ("finetune", "--lora"),
    "finetune-image-classification, lora": ("finetune-image-classification", "--lora"),
}


def saved(folder: Path) -> dict[str, bytes]:
    """Weights, and samples that were drawn."""
    files = [*folder.glob("*.safetensors"), *folder.glob("samples/final.png")]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_streamed_it_ends_with_the_same_weights_and_resumed_too(way, places, tmp_path, capsys):
    """Bit for bit; a checkpoint of a streamed run goes on as a run that is not, or with layers that stay."""
    task, *options = way
    run(task, places, tmp_path / "held", *options, "--save_strategy", "no")
    options += ["--save_strategy", "steps", "--save_steps", "0.5"]
    run(task, places, tmp_path / "streamed", *options, "--stream")
    assert "at most 2 on the device at once" in capsys.readouterr().out or task not in ("finetune", "finetune-block-diffusion")
    half, _ = sorted((tmp_path / "streamed").glob("checkpoint-*"))
    shutil.copytree(half, tmp_path / "resumed" / half.name)
    kept = ["--stream", "--keep", "1"] if task == "finetune" else []
    run(task, places, tmp_path / "resumed", *options, *kept, "--resume_from_checkpoint", "last")
    held, streamed, resumed = (saved(tmp_path / name) for name in ("held", "streamed", "resumed"))
    assert held and held == streamed == resumed
    assert all(weights != held[name] for name, weights in saved(half).items())  # it went on


PRETRAINED = ["--config_name", "", "--config_overrides", "", "--model_name_or_path", "{model}"]
JOBS = {
    "causal-lm": ("causal-lm", "--preset", "paper"),
    "causal-lm, pretrained": ("causal-lm", "--preset", "paper", *PRETRAINED),
    "masked-lm": ("masked-lm",),
    "masked-lm, pretrained": ("masked-lm", *PRETRAINED),
    "image-generation": ("image-generation",),
    "finetune-masked-lm": ("finetune-masked-lm", "--model", "{model}", "--num_blocks", "2"),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_one_block_a_job_then_merged(job, places, tmp_path):
    task, *options = job
    options = [*(option.format(**places) for option in options), "--save_strategy", "no", "--shared", "per_block"]
    for block in ("0", "1"):
        run(task, places, tmp_path / block, *options, "--train_blocks", block)
        assert {block} <= {*shards.saved_index(tmp_path / block).files} <= {block, "shared"}
        assert not (tmp_path / block / "samples").exists()
    db.merge_blocks([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    assert config.training_report["updates_per_block"] == [4, 4]
    assert TASKS[config.task].auto_class.from_pretrained(tmp_path / "whole").resident_blocks == [0, 1]


CONFIGS = {file.stem: file for file in (Path(common.__file__).parent / "configs").glob("*.yaml")}
TASK_OF = {
    "digits": "image-classification", "fashion_mnist": "image-classification", "digits_dit": "image-generation",
    "fashion_mnist_dit": "image-generation", "gutenberg": "causal-lm", "gutenberg_masked": "masked-lm",
    "finetune_8b_16gb": "finetune", "finetune_8b_8gb": "finetune", "finetune_masked_0.6b_8gb": "finetune-masked-lm",
    "finetune_vit_lora": "finetune-image-classification",
}  # fmt: skip


@pytest.mark.parametrize("name", TASK_OF)
def test_the_configs_that_come_along_run(name, places, tmp_path):
    """With a smaller model, in fewer steps, and without torchao's optimizer."""
    run(TASK_OF[name], places, tmp_path, "--config", CONFIGS[name], "--optim", "adamw_torch")
    assert saved(tmp_path)


def test_no_config_is_left_out():
    """(What else there is runs in test_recipe_finetune_image_model.py and test_recurrent_depth.py.)"""
    others = {name for name in CONFIGS if name.startswith(("finetune_flux", "finetune_qwen", "finetune_sd35"))}
    assert {*CONFIGS} == {*TASK_OF, *others, "gutenberg_recurrent"}
