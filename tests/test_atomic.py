"""Checkpoints of the Trainer: killed at any moment, a run resumes to the same weights."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from process_scenarios import GPT2, made, trainer_of
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import hf_diffusionblocks as db

STEPS, KILLS = 12, 4
RECOMMENDED = {"preset": "recommended", "local_head_layers": 0}
#: Name -> fields of `convert`, resident blocks, training arguments
MODES = {
    "all blocks": (RECOMMENDED, None, {}),
    "one block": ({"preset": "paper", "shared": "per_block"}, [1], {}),
    "in turns": (RECOMMENDED, None, {"block_schedule": "random"}),
}
FILES = {"config.json", "model.safetensors.index.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


class Announce(TrainerCallback):
    """Says through a pipe that a save is about to begin, and when it has ended."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        self.pipe.send(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.pipe.send("saved")


def trainer(mode: str, folder: Path, **arguments) -> db.DiffusionBlocksTrainer:
    fields, resident, own = MODES[mode]
    model = made(GPT2, fields, resident)
    arguments = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **own, **arguments}
    return trainer_of(model, GPT2, folder, arguments)


def train(mode: str, folder: Path, pipe) -> None:
    tqdm.set_lock(threading.RLock())  # not the parent's: who is killed while he holds that, holds it for ever
    run = trainer(mode, folder)
    run.add_callback(Announce(pipe))
    run.train(resume_from_checkpoint=get_last_checkpoint(folder))
    pipe.send("done")


def killed_while_saving(mode: str, folder: Path, saves_before: int, share: float) -> None:
    """Train in a process, and kill it this share of a save's time into a save."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=train, args=(mode, folder, sender), daemon=True)
    process.start()
    duration = 0.0
    for _ in range(saves_before):
        assert receiver.poll(120) and receiver.recv() != "done"
        start = time.perf_counter()
        assert receiver.poll(120) and receiver.recv() == "saved"
        duration = time.perf_counter() - start
    assert receiver.poll(120) and receiver.recv() != "done"
    time.sleep(share * duration)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("mode", MODES)
def test_killed_while_saving_and_resumed_is_the_uninterrupted_run(mode, tmp_path):
    uninterrupted = trainer(mode, tmp_path / "whole", save_strategy="no")
    uninterrupted.train()
    choose, folder = random.Random(mode), tmp_path / "killed"
    folder.mkdir()
    for _ in range(KILLS):
        killed_while_saving(mode, folder, saves_before=choose.choice([1, 2]), share=choose.random())
        found = [path for path in folder.iterdir() if path.name.startswith("checkpoint-")]
        assert found
        for path in found:
            assert FILES <= {file.name for file in path.iterdir()}
            type(uninterrupted.model).from_pretrained(path, resident_blocks=MODES[mode][1])
    resumed = trainer(mode, folder)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(folder))
    expected = uninterrupted.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.model.state_dict().items())
    assert [path.name for path in folder.iterdir() if path.name.startswith("_")] == []


def test_a_checkpoint_has_its_name_only_when_whole(tmp_path, monkeypatch):
    """Stopped at each file that is written: no folder of that name."""
    run = trainer("all blocks", tmp_path, max_steps=1)
    saved, save = [], torch.save

    def stop(value, path, *args, **kwargs):
        saved.append(Path(path).name)
        assert not (tmp_path / "checkpoint-1").exists()
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", stop)
    run.train()
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(saved)
    assert FILES <= {path.name for path in (tmp_path / "checkpoint-1").iterdir()}


def test_a_checkpoint_of_an_earlier_run_is_replaced(tmp_path):
    trainer("all blocks", tmp_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / "mark").touch()
    trainer("all blocks", tmp_path, max_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "mark").exists()
    assert FILES <= {path.name for path in (tmp_path / "checkpoint-1").iterdir()}


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_old_checkpoints_are_removed(tmp_path, limit, kept):
    trainer("all blocks", tmp_path, max_steps=4, save_total_limit=limit).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in kept]


def test_the_best_checkpoint_is_known_by_its_final_name(tmp_path):
    run = trainer(
        "all blocks", tmp_path, max_steps=4, save_total_limit=1, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_loss", greater_is_better=True, block_schedule="random",
    )  # fmt: skip
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = tmp_path / f"checkpoint-{1 + losses.index(max(losses))}"
    assert best.name != "checkpoint-4"
    assert list(tmp_path.glob("checkpoint-*")) == [best]  # as Transformers has it, with a limit of one
    assert type(run.state).load_from_json(best / "trainer_state.json").best_model_checkpoint == str(best)
