"""Files: a shard a block, round trips, one block alone, damage that is named, saves that cannot be half done."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FORMULATIONS, randomized
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.utils.logging import disable_progress_bar

import hf_diffusionblocks as db
from hf_diffusionblocks import checkpoint

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]

FRESH_PROCESS = """
import sys, torch
from pathlib import Path
import hf_diffusionblocks
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
images = torch.load(sys.argv[1] + "/images.pt")
for folder in Path(sys.argv[1]).glob("model-*"):
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        torch.save((model(pixel_values=images).logits, model.predict(images, 5).trajectory), folder / "outputs.pt")
"""


@pytest.fixture
def saved(plain_model, tmp_path):
    """A saved model of two blocks, and its folder."""
    model = randomized(db.convert(plain_model, num_blocks=2, context="carried", readout_layers=1)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def states_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the files


def test_one_file_for_shared_parameters_and_one_for_each_block(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    for file, block in zip(SHARDS, [None, 0, 1]):
        expected = {key for key in model.state_dict() if model.block_of_parameter(key) == block}
        assert set(load_file(folder / file)) == expected


def test_index_maps_keys_and_blocks_to_files(saved):
    model, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["blocks"] == dict(zip(["shared", "0", "1"], SHARDS))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_round_trip_in_a_fresh_process_is_bit_equal(plain_model, batch, tmp_path):
    torch.save(batch["pixel_values"], tmp_path / "images.pt")
    models = {}
    for name, fields in FORMULATIONS.items():
        models[name] = randomized(db.convert(plain_model, num_blocks=2, preset="paper", **fields)).eval()
        models[name].save_pretrained(tmp_path / f"model-{name}")
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], check=True, timeout=120)
    for name, model in models.items():
        logits, trajectory = torch.load(tmp_path / f"model-{name}" / "outputs.pt")
        with torch.no_grad():
            assert torch.equal(model(pixel_values=batch["pixel_values"]).logits, logits), name
            assert torch.equal(model.predict(batch["pixel_values"], 5).trajectory, trajectory), name


def test_saving_again_with_other_blocks_leaves_no_stale_file(saved, plain_model):
    _, folder = saved
    (folder / "model.safetensors").write_bytes(b"stale: it would beat the index")
    other = db.convert(plain_model, num_blocks=4, preset="paper")
    other.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]
    assert states_equal(type(other).from_pretrained(folder).state_dict(), other.state_dict())


def test_other_files_of_the_folder_stay(saved):
    model, folder = saved
    (folder / "trainer_state.json").write_text("mine")
    model.save_pretrained(folder)
    assert (folder / "trainer_state.json").read_text() == "mine"


def test_a_variant_is_refused(saved):
    with pytest.raises(ValueError, match="variant='fp16' is not supported"):
        saved[0].save_pretrained(saved[1], variant="fp16")


# ---- one block alone


@pytest.mark.parametrize("block_index", [None, 0, 1])
def test_one_block_is_loaded_from_its_own_file(saved, block_index, tmp_path):
    model, folder = saved
    alone = tmp_path / "alone"
    alone.mkdir()
    file = SHARDS[0 if block_index is None else block_index + 1]
    for name in ("model.safetensors.index.json", file):
        shutil.copy(folder / name, alone / name)
    state = db.load_block_state_dict(alone, block_index)
    expected = {k: v for k, v in model.state_dict().items() if model.block_of_parameter(k) == block_index}
    assert states_equal(state, expected)


def test_a_block_that_does_not_exist_is_named(saved):
    with pytest.raises(ValueError, match="block_index=2 must be one of 0, 1, shared"):
        db.load_block_state_dict(saved[1], 2)


def test_a_plain_checkpoint_has_no_blocks(plain_model, tmp_path):
    plain_model.save_pretrained(tmp_path, max_shard_size="10KB")
    with pytest.raises(ValueError, match="is not a DiffusionBlocks checkpoint"):
        db.load_block_state_dict(tmp_path, 0)


# ---- damage


@pytest.mark.parametrize("load", [AutoModelForImageClassification, db.DiffusionBlocksForImageClassification])
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 10), "is truncated: it has .* bytes, its header promises"),
        (lambda path: os.truncate(path, 30), "is truncated: its header is cut off"),
        (lambda path: os.truncate(path, 0), "is truncated or damaged: its header is not JSON"),
        (lambda path: path.write_bytes(b"\x08" + 7 * b"\0" + 8 * b"?"), "is truncated or damaged: its header is not JSON"),
    ],
    ids=["missing", "truncated", "header cut", "empty", "garbage"],
)
def test_a_damaged_shard_is_named(saved, load, shard, damage, message):
    damage(saved[1] / shard)
    with pytest.raises(OSError, match=f"{shard} {message}"):
        load.from_pretrained(saved[1])


# ---- interrupted saves


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    model, folder = saved
    old = copy.deepcopy(model.state_dict())
    randomized(model)

    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr(checkpoint, "split_by_block", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        model.save_pretrained(folder)
    assert states_equal(type(model).from_pretrained(folder).state_dict(), old)
    assert not (folder / checkpoint.STAGED).exists()


@pytest.mark.parametrize("files_moved", range(6))
def test_a_save_killed_while_moving_its_files_is_finished_by_the_next_reader(saved, monkeypatch, files_moved):
    model, folder = saved
    randomized(model).config.inference_seed = 7
    moved, replace = [], os.replace

    def die(source, target):
        if source.parent.name == checkpoint.COMPLETE:
            if len(moved) == files_moved:
                raise KeyboardInterrupt
            moved.append(source)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        model.save_pretrained(folder)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert states_equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.inference_seed == 7
    assert not (folder / checkpoint.COMPLETE).exists()


def _save_for_ever(models, folder):
    disable_progress_bar()  # a process killed inside tqdm would take the lock it shares with this one along
    while True:
        for model in models:
            model.save_pretrained(folder)


def test_a_process_killed_at_any_moment_leaves_one_whole_model(saved):
    """SIGKILL a process that saves two models in turn: what is on disk is always one of them."""
    model, folder = saved
    other = randomized(copy.deepcopy(model))
    expected = [model.state_dict(), other.state_dict()]
    delay = random.Random(0)
    for _ in range(15):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=([model, other], folder))
        process.start()
        time.sleep(0.1 + 0.2 * delay.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        loaded = type(model).from_pretrained(folder).state_dict()
        assert any(states_equal(loaded, state) for state in expected)
