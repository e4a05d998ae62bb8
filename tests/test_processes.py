"""Several processes under `accelerate launch` (gloo): data parallelism."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from process_scenarios import BATCH, DIT, GPT2, PROCESSES, RESUMED, SCENARIOS, STEPS, STREAMED, made, trainer_of
from streaming_models import assert_same

import hf_diffusionblocks as db
from hf_diffusionblocks.training.checks import check_processes

SCRIPT = Path(__file__).parent / "process_scenarios.py"
#: --multi_gpu is accelerate's torchrun launcher; --cpu would want MPI. The arguments' use_cpu makes it gloo.
MULTIPLE = "--multi_gpu"
LAUNCH = "accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


def launch(processes: int, *arguments: str, options: str = MULTIPLE) -> subprocess.Popen:
    command = [sys.executable, "-m", *LAUNCH.split(), *options.split(), "--num_processes", str(processes), *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def launched(*arguments, **kwargs) -> None:
    assert launch(*arguments, **kwargs).wait(timeout=300) == 0


@pytest.fixture(scope="session")
def outcomes(folder_of_all_workers) -> Path:
    """Folder with what all scenarios left: one launch, shared by pytest's workers."""
    folder = folder_of_all_workers / "scenarios"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.mkdir()
            launched(PROCESSES, str(SCRIPT), str(folder), *SCENARIOS)
    return folder


@cache
def outcome(folder: Path, name: str) -> list[dict]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=tolerance, atol=tolerance, msg=lambda m: f"{key}: {m}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_processes_leave_their_groups(outcomes):
    """A thread of gloo that lives on may abort a process that ends well."""
    paths = list(outcomes.glob("threads-*.txt"))
    assert len(paths) == PROCESSES and not any("gloo" in path.read_text() for path in paths)


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_end_with_the_same_weights(outcomes, name):
    first, *others = outcome(outcomes, name)
    for other in others:
        for part in ("state", "averages"):
            assert all(torch.equal(first[part][key], other[part][key]) for key in first[part])
        assert other["loss"] == first["loss"]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("data parallel")])
def test_data_parallel_is_one_process_with_all_rows(outcomes, name, tmp_path):
    """Noise included: it goes with the row. Only the order in which numbers are summed differs."""
    source, fields, arguments = SCENARIOS[name]
    model = made(source, fields)
    trainer = trainer_of(model, source, tmp_path, arguments, batch=PROCESSES * BATCH)
    trainer.train()
    assert_close(outcome(outcomes, name)[0]["state"], model.state_dict(), tolerance=1e-5)
    with trainer.averaged_weights():
        assert_close(outcome(outcomes, name)[0]["averages"], model.state_dict(), tolerance=1e-5)


def test_losses_of_blocks_in_evaluation_are_those_of_one_process(outcomes, tmp_path):
    found = outcome(outcomes, "data parallel, image generation")[0]
    model = made(DIT, {})
    model.load_state_dict(found["state"])
    expected = trainer_of(model, DIT, tmp_path, {}).evaluate()
    for name in ("eval_loss", "eval_loss_block_0", "eval_loss_block_1"):
        assert found["log"][-1][name] == pytest.approx(expected[name], rel=1e-6)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """The same noise, too."""
    source, fields, arguments = SCENARIOS["data parallel, text"]
    whole, parts = made(source, fields), made(source, fields)
    trainer_of(whole, source, tmp_path, arguments, batch=2 * BATCH).train()
    trainer_of(parts, source, tmp_path, {**arguments, "gradient_accumulation_steps": 2}, batch=BATCH).train()
    assert_close(parts.state_dict(), whole.state_dict(), tolerance=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(outcomes, name):
    for rank, expected in enumerate(outcome(outcomes, name)):
        resumed = torch.load(outcomes / f"{name}.resumed.{rank}.pt", weights_only=True)
        assert all(torch.equal(resumed[key], expected["state"][key]) for key in resumed)


def test_killed_while_saving_it_has_whole_checkpoints(tmp_path):
    """From which a run goes on: see above."""
    name = "data parallel, text"
    run = launch(PROCESSES, str(SCRIPT), str(tmp_path), "--saving", name)
    folder = tmp_path / f"{name}-killed"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-1").is_dir() or not (folder / "_saving").is_dir():  # in its second save, or third
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    launcher = psutil.Process(run.pid)
    for process in (*launcher.children(recursive=True), launcher):  # each worker has a session of its own
        process.send_signal(signal.SIGKILL)
    run.wait()
    assert (found := [*folder.glob("checkpoint-*")])
    for path in found:
        assert {"optimizer.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in path.iterdir()}
        db.DiffusionBlocksForCausalLM.from_pretrained(path)


def test_the_saved_model_has_all_blocks(outcomes):
    name = "data parallel, text"
    model, expected = db.DiffusionBlocksForCausalLM.from_pretrained(outcomes / name), outcome(outcomes, name)[0]["averages"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert sum(model.config.training_report["updates_per_block"]) == STEPS


@pytest.mark.parametrize("name", STREAMED)
def test_two_processes_train_a_streamed_model_as_a_stock_one(name, outcomes):
    """Gradients are averaged as in stock data parallelism, bit for bit."""
    stock, *streamed = (torch.load(outcomes / f"{name}-{end}.pt") for end in ("False-0", "True-0", "True-1"))
    for each in streamed:
        assert_same(stock, each)


# ---- what is refused


@pytest.mark.parametrize("name, setting", [("DeepSpeed", "is_deepspeed_enabled"), ("FSDP", "is_fsdp_enabled")])
def test_what_takes_a_model_apart_is_refused(name, setting, tmp_path):
    trainer = trainer_of(made(GPT2, {}), GPT2, tmp_path, {})
    setattr(trainer, setting, True)
    with pytest.raises(ValueError, match=rf"{name} is not supported for blocks: .*stream_layers\(model\)"):
        check_processes(trainer)


def test_half_precision_with_a_loss_scale_is_refused(tmp_path, monkeypatch):
    """Of the launcher's, too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16=True must be False: .* bf16=True needs none"):
        trainer_of(made(GPT2, {}), GPT2, tmp_path, {})
