"""Files: a shard a block, round trips, one block alone, damage that is named, saves that cannot be half done."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import randomized
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.utils.logging import disable_progress_bar

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import shards
from hf_diffusionblocks.cli.inspect import describe

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def saved(plain_model, tmp_path):
    """A saved model of two blocks, and its folder."""
    model = randomized(db.convert(plain_model, num_blocks=2, local_head_layers=1)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def states_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the files


def test_one_file_for_shared_parameters_and_one_for_each_block_and_their_index(saved):
    model, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["blocks"] == dict(zip(["shared", "0", "1"], SHARDS))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    for file, block in zip(SHARDS, [None, 0, 1]):
        expected = {key for key in model.state_dict() if model.block_of_parameter(key) == block}
        assert set(load_file(folder / file)) == expected


def test_saving_again_with_other_blocks_leaves_no_stale_file(saved, plain_model):
    _, folder = saved
    (folder / "model.safetensors").write_bytes(b"stale: it would beat the index")
    other = db.convert(plain_model, num_blocks=4, preset="paper")
    other.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]
    assert states_equal(type(other).from_pretrained(folder).state_dict(), other.state_dict())


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
    with pytest.raises(ValueError, match="block_index=2 must be one of 0, 1, shared"):
        db.load_block_state_dict(alone, 2)
    expected = {k: v for k, v in model.state_dict().items() if model.block_of_parameter(k) == block_index}
    assert states_equal(state, expected)


def test_a_plain_checkpoint_has_no_blocks(plain_model, tmp_path):
    plain_model.save_pretrained(tmp_path, max_shard_size="10KB")
    with pytest.raises(ValueError, match="is not a DiffusionBlocks checkpoint"):
        db.load_block_state_dict(tmp_path, 0)


# ---- damage


READERS = {
    "whole": AutoModelForImageClassification.from_pretrained,
    "part": lambda folder: db.DiffusionBlocksForImageClassification.from_pretrained(folder, resident_blocks=[1]),
    "block": lambda folder: db.load_block_state_dict(folder, 1),
    "merge": lambda folder: db.merge_blocks([folder], folder.parent / "merged"),
    "inspect": lambda folder: describe(str(folder)),
}


@pytest.mark.parametrize("reader", ["whole", "merge", "inspect"])
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
def test_a_damaged_shard_is_named(saved, reader, shard, damage, message):
    damage(saved[1] / shard)
    with pytest.raises(OSError, match=f"{shard} {message}"):
        READERS[reader](saved[1])


@pytest.mark.parametrize("resident", [None, [0]], ids=["whole", "part"])
@pytest.mark.parametrize("shared", ["common", "per_block"])
@pytest.mark.parametrize(
    "edit", [*({"num_blocks": k} for k in (1, 3, 4)), *({"layers_per_block": each} for each in ([1, 3], [3, 1]))], ids=str
)
def test_a_config_that_says_another_cut_than_the_files_is_refused(plain_model, edit, shared, resident, tmp_path):
    model = db.convert(plain_model, num_blocks=2, shared=shared)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ValueError, match="was cut into other blocks than its config says"):
        type(model).from_pretrained(tmp_path, resident_blocks=resident)


@pytest.mark.parametrize(
    "damaged",
    [b"{", b"", b"\xff\xfe{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": [], "metadata": {}}',
     b'{"weight_map": {}, "metadata": {"blocks": ["0"]}}'],
)  # fmt: skip
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_damaged_index_is_named(saved, read, damaged):
    index = saved[1] / "model.safetensors.index.json"
    index.write_bytes(damaged)
    with pytest.raises(OSError, match=f"{index} is damaged"):
        read(saved[1])


# ---- interrupted saves


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    model, folder = saved
    old = copy.deepcopy(model.state_dict())
    randomized(model)

    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr(shards, "split_by_block", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        model.save_pretrained(folder)
    assert states_equal(type(model).from_pretrained(folder).state_dict(), old)
    assert not (folder / shards.STAGED).exists()


def kill_while_moving(model, folder: Path, files_moved: int) -> None:
    """Save a model, up to when so many of its files are in place."""
    moved, replace = [], os.replace

    def die(source, target):
        if source.parent.name == shards.COMPLETE:
            if len(moved) == files_moved:
                raise KeyboardInterrupt
            moved.append(source)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        model.save_pretrained(folder)


@pytest.mark.parametrize("files_moved", range(6))
def test_a_save_killed_while_moving_its_files_is_finished_by_the_next_reader(saved, files_moved):
    model, folder = saved
    randomized(model).config.training_report = {"steps": 7}
    kill_while_moving(model, folder, files_moved)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert states_equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.training_report == {"steps": 7}
    assert not (folder / shards.COMPLETE).exists()


@pytest.mark.parametrize("subfolder", ["", "inside"])
@pytest.mark.parametrize("files_moved", range(6))
def test_so_it_is_by_a_reader_of_one_block(saved, tmp_path, files_moved, subfolder):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "other" / subfolder)
    kill_while_moving(randomized(model), tmp_path / "other" / subfolder, files_moved)
    state = db.load_block_state_dict(tmp_path / "other", 1, subfolder=subfolder)
    assert states_equal(state, {k: v for k, v in model.state_dict().items() if model.block_of_parameter(k) == 1})


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
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=([model, other], folder))
        process.start()
        time.sleep(0.1 + 0.2 * delay.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        loaded = type(model).from_pretrained(folder).state_dict()
        assert any(states_equal(loaded, state) for state in expected)


# ---- several readers at a time


@pytest.fixture
def interrupted(plain_model, saved, tmp_path):
    """Makes folders with a model of two blocks, and of four whose save was killed before it moved a file, and the files
    that are right in the end."""
    new = tmp_path / "new"
    db.convert(plain_model, num_blocks=4).save_pretrained(new)
    (new / "block_0").mkdir()
    (new / "block_0" / "more.json").write_text("{}")
    (new / "tokenizer.json").write_text("{}")  # moved after the index

    def make(name: str) -> Path:
        folder = shutil.copytree(saved[1], tmp_path / name)
        (folder / "model.safetensors").write_bytes(b"stale: it would beat the index")
        shutil.copytree(new, folder / shards.COMPLETE)
        return folder

    return make, contents(new)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _read_together(folders, barrier, faults):
    for folder in folders:
        barrier.wait()
        try:
            shards.finish_interrupted_save(folder)
            shards.check_shards(folder)
            blocks = [db.load_block_state_dict(folder, block) for block in (None, 0, 1, 2, 3)]
            assert all(blocks) and not (folder / "model.safetensors").exists()
        except Exception as error:
            faults.put(f"{folder}: {error!r}")


def test_readers_that_finish_a_save_together_do_not_disturb_one_another(interrupted):
    make, expected = interrupted
    folders = [make(f"race-{number}") for number in range(40)]
    context = multiprocessing.get_context("fork")
    barrier, faults = context.Barrier(4), context.SimpleQueue()
    readers = [context.Process(target=_read_together, args=(folders, barrier, faults)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert faults.empty(), faults.get()
    assert all(contents(folder) == expected and not (folder / shards.COMPLETE).exists() for folder in folders)


@contextmanager
def before_step(number: int, act):
    """Have another process act just before a step of the file system: one that moves or removes something."""
    steps = []

    def watched(step):
        def call(*args, **kwargs):
            steps.append(step)
            if len(steps) == number + 1:
                act()
            return step(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        yield steps


def test_a_reader_may_find_any_step_taken_by_another(interrupted):
    make, expected = interrupted
    with before_step(-1, None) as steps:
        shards.finish_interrupted_save(make("alone"))
    assert len(steps) > len(expected)
    for number in range(len(steps)):
        folder = make(f"step-{number}")
        with before_step(number, lambda: shards.finish_interrupted_save(folder)):
            shards.finish_interrupted_save(folder)
        assert contents(folder) == expected and not (folder / shards.COMPLETE).exists(), steps[number]


def test_a_slow_reader_loses_nothing_of_the_writer_s_next_save(interrupted, plain_model, tmp_path):
    """Stopped before a step, until the writer has begun to move the files of a save with names that are new."""
    make, _ = interrupted
    db.convert(plain_model, num_blocks=1).save_pretrained(tmp_path / "next")
    expected = contents(tmp_path / "next")
    with before_step(-1, None) as steps:
        shards.finish_interrupted_save(make("alone"))
    for number, moved in itertools.product(range(len(steps)), range(len(expected))):
        folder = make(f"slow-{number}-{moved}")

        def write():
            shards.finish_interrupted_save(folder)
            shutil.copytree(tmp_path / "next", folder / shards.COMPLETE)
            for name in sorted(expected)[:moved]:
                os.rename(folder / shards.COMPLETE / name, folder / name)

        with before_step(number, write):
            shards.finish_interrupted_save(folder)
        shards.finish_interrupted_save(folder)  # the writer goes on
        assert expected.items() <= contents(folder).items(), steps[number]
        shards.check_shards(folder)
