"""The shell scripts that start one-block jobs and merge them: recipes/jobs.sh, and the Slurm array."""

from __future__ import annotations

import os
import subprocess
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.recipes import train_causal_lm

ROOT = Path(__file__).resolve().parents[1]
JOBS, SLURM = ROOT / "recipes" / "jobs.sh", ROOT / "recipes" / "jobs_slurm.sh"
#: In place of `diffusionblocks`: notes its arguments and GPU, refuses `--typo`, writes a checkpoint, and fails if the file
#: `fail-K` is there.
FAKE = """#!/usr/bin/env bash
echo "gpu ${CUDA_VISIBLE_DEVICES-none}: $*" >>calls
if [[ $1 == train ]]; then
    if [[ $* == *--typo* ]]; then echo "recipe.py: error: --typo"; exit 2; fi
    [[ $* =~ --train_blocks\\ ([0-9]+).*--output_dir\\ ([^ ]+) ]]
    mkdir -p "${BASH_REMATCH[2]}/checkpoint-2"
    if [[ -e fail-${BASH_REMATCH[1]} ]]; then echo "recipe.py: error: out of luck"; exit 3; fi
fi
"""
OPTIONS = ["causal-lm", "--learning_rate", "1e-2"]


@pytest.fixture
def faked(tmp_path, monkeypatch) -> Path:
    """A folder to run in, where a fake `diffusionblocks` notes what it is called with."""
    fake = tmp_path / "bin" / "diffusionblocks"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def run(folder: Path, *args, script: Path = JOBS, **settings) -> subprocess.CompletedProcess:
    command = [str(script), *map(str, args)]
    return subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)


def calls(folder: Path) -> list[str]:
    """What has been called since this was asked last, in whatever order the jobs have run."""
    noted = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    (folder / "calls").unlink(missing_ok=True)
    return sorted(noted)


# ---- one command for all


def test_one_job_a_block_and_then_the_merge(faked):
    assert run(faked, "all", 2, "out", *OPTIONS).returncode == 0
    train = "gpu : train --num_processes 1 causal-lm --learning_rate 1e-2 --num_blocks 2 --train_blocks {0} "
    train += "--shared per_block --output_dir out/block-{0}"
    assert calls(faked) == [
        "gpu : merge --overwrite out/whole out/block-0 out/block-1",
        train.format(0),
        train.format(1),
    ]


def test_a_failed_job_fails_the_whole_by_name_and_the_others_are_trained(faked):
    (faked / "fail-1").touch()
    failed = run(faked, "all", 3, "out", *OPTIONS)
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "block 1: recipe.py: error: out of luck (out/block-1/log.txt)",
        "jobs.sh: error: of the 3 blocks in out these are not done: 1. Nothing is merged; start them again, and they go on",
    ]
    assert [call.split()[2] for call in calls(faked)] == ["train"] * 3


def test_the_same_again_resumes_what_failed_and_leaves_alone_what_is_done(faked):
    (faked / "fail-1").touch()
    run(faked, "all", 3, "out", *OPTIONS)
    (faked / "fail-1").unlink()
    calls(faked)
    assert run(faked, "all", 3, "out", *OPTIONS).returncode == 0
    merge, train = calls(faked)
    assert "--train_blocks 1 " in train and train.endswith("--resume_from_checkpoint last")
    assert " merge " in merge


def test_other_options_do_not_go_on_in_the_same_folder(faked):
    run(faked, "all", 2, "out", *OPTIONS)
    failed = run(faked, "block", 0, 2, "out", "causal-lm", "--learning_rate", "2e-2")
    assert failed.returncode == 1
    assert "jobs.sh: error: out/block-0 was trained by other options: 2 causal-lm --learning_rate 1e-2" in failed.stderr


def test_options_that_were_refused_can_be_corrected(faked):
    assert run(faked, "all", 2, "out", *OPTIONS, "--typo").returncode == 1
    assert run(faked, "all", 2, "out", *OPTIONS).returncode == 0


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        ("", {"JOBS": "2"}, ["", "", "", ""]),
        ("3,5", {}, ["3", "3", "5", "5"]),
        ("3,5", {"JOBS": "4"}, ["3", "3", "5", "5"]),
        ("7", {}, ["7", "7", "7", "7"]),
    ],
)
def test_each_job_has_one_of_the_gpus(faked, gpus, settings, expected):
    run(faked, "all", 4, "out", *OPTIONS, CUDA_VISIBLE_DEVICES=gpus, **settings)
    trained = [call for call in calls(faked) if " train " in call]
    assert [call.removeprefix("gpu ").split(":")[0] for call in trained] == expected


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "usage: jobs.sh all|block|merge"),
        (["all", 2, "out"], "usage: jobs.sh all B OUT_DIR TASK"),
        (["block", 2, 2, "out", "causal-lm"], "block 2 must be one of 0..1"),
        (["merge", 2, "out"], "of the 2 blocks in out these are not done: 0 1."),
    ],
)
def test_what_is_wrong_is_said_in_one_line(faked, args, said):
    failed = run(faked, *args)
    assert failed.returncode == 1 and not calls(faked)
    (line,) = failed.stderr.splitlines()
    assert line.startswith("jobs.sh: error: ") and said in line


# ---- a Slurm array


def test_a_task_of_the_array_trains_its_block(faked):
    settings = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert run(faked, 2, "out", *OPTIONS, script=SLURM, **settings).returncode == 0
    (call,) = calls(faked)
    assert "--train_blocks 1 " in call and (faked / "out" / "block-1" / "done").exists()


def test_a_task_that_fails_has_its_recipe_s_status(faked):
    (faked / "fail-1").touch()
    settings = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert run(faked, 2, "out", *OPTIONS, script=SLURM, **settings).returncode == 3
    assert "these are not done: 0 1." in run(faked, "merge", 2, "out").stderr


def test_outside_an_array_it_says_so(faked):
    failed = run(faked, 2, "out", *OPTIONS, script=SLURM, SLURM_SUBMIT_DIR=str(ROOT))
    assert failed.returncode != 0 and "SLURM_ARRAY_TASK_ID: is set by sbatch --array" in failed.stderr


# ---- in earnest


@pytest.mark.usefixtures("own_cache")
def test_what_is_called_trains_a_block_each_of_a_model_that_writes(faked, tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("Once upon a time there was a block.\n\n" * 200)
    options = [
        "causal-lm", "--config_name", "gpt2", "--config_overrides", "n_layer=2,n_embd=32,n_head=2,n_positions=24",
        "--vocab_size", "280", "--sequence_length", "24", "--train_file", "train.txt", "--preset", "paper",
        "--updates_per_block", "4", "--per_device_train_batch_size", "8", "--use_cpu",
        "--disable_tqdm", "true", "--report_to", "none", "--save_steps", "2",
    ]  # fmt: skip
    assert run(faked, "all", 2, "out", *options).returncode == 0
    merge, *jobs = (shlex.split(call.partition(": ")[2]) for call in calls(faked))
    monkeypatch.chdir(tmp_path)
    for verb, _, _, task, *given in jobs:
        assert (verb, task) == ("train", "causal-lm")
        train_causal_lm.main(given)
    main(merge)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "whole")
    assert isinstance(model, db.DiffusionBlocksForCausalLM) and model.config.training_report["updates_per_block"] == [4, 4]
    for k in range(2):
        for file in (tmp_path / "out" / f"block-{k}").glob("model-*.safetensors"):
            assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in load_file(file).items())
