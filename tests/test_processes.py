"""Several processes under `accelerate launch` (gloo): data parallelism, and blocks in parallel."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from process_scenarios import (
    BATCH, DIT, GPT2, INDEPENDENT, RESUMED, SCENARIOS, SHARDED, SHARDED_JOB, STEPS, VIT, made, trainer_of,
)  # fmt: skip
from safetensors.torch import load_file

import hf_diffusionblocks as db
from hf_diffusionblocks.training.checks import check_processes
from hf_diffusionblocks.training.parallel import Layout

SCRIPT = Path(__file__).parent / "process_scenarios.py"
#: --multi_gpu is accelerate's torchrun launcher; --cpu would want MPI. The arguments' use_cpu makes it gloo.
MULTIPLE = "--multi_gpu"
LAUNCH = "accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"

BLOCKS = [name for name, (*_, arguments) in SCENARIOS.items() if arguments.get("block_parallel")]
DATA = [name for name in SCENARIOS if name not in BLOCKS]


def launch(processes: int, *arguments: str, options: str = MULTIPLE) -> subprocess.Popen:
    command = [sys.executable, "-m", *LAUNCH.split(), *options.split(), "--num_processes", str(processes), *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def launched(*arguments, **kwargs) -> None:
    assert launch(*arguments, **kwargs).wait(timeout=300) == 0


@pytest.fixture(scope="session")
def outcomes(folder_of_all_workers) -> Path:
    """Folder with what all scenarios left: one launch for each number of processes, shared by pytest's workers."""
    folder = folder_of_all_workers / "scenarios"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.mkdir()
            for processes in (2, 4):
                names = [name for name, (count, *_) in SCENARIOS.items() if count == processes]
                launched(processes, str(SCRIPT), str(folder), *names)
    return folder


@cache
def outcome(folder: Path, name: str) -> list[dict]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(SCENARIOS[name][0])]


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=tolerance, atol=tolerance, msg=lambda m: f"{key}: {m}")


def assert_that_groups_are_left(folder: Path, processes: int) -> None:
    """A thread of gloo that lives on may abort a process that ends well."""
    paths = list(folder.glob(f"threads-{processes}-*.txt"))
    assert len(paths) == processes and not any("gloo" in path.read_text() for path in paths)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_leave_their_groups(outcomes, processes):
    assert_that_groups_are_left(outcomes, processes)


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_end_with_the_same_weights(outcomes, name):
    first, *others = outcome(outcomes, name)
    for other in others:
        for part in ("state", "averages"):
            assert all(torch.equal(first[part][key], other[part][key]) for key in first[part])
        assert other["loss"] == first["loss"]


@pytest.mark.parametrize("name", DATA)
def test_data_parallel_is_one_process_with_all_rows(outcomes, name, tmp_path):
    """Noise included: it goes with the row. Only the order in which numbers are summed differs."""
    processes, source, fields, arguments = SCENARIOS[name]
    model = made(source, fields)
    trainer = trainer_of(model, source, tmp_path, arguments, batch=processes * BATCH)
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
    _, source, fields, arguments = SCENARIOS["data parallel, text"]
    whole, parts = made(source, fields), made(source, fields)
    trainer_of(whole, source, tmp_path, arguments, batch=2 * BATCH).train()
    trainer_of(parts, source, tmp_path, {**arguments, "gradient_accumulation_steps": 2}, batch=BATCH).train()
    assert_close(parts.state_dict(), whole.state_dict(), tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "shared" in name and "trained" not in name])
def test_block_parallel_is_one_job_a_block(outcomes, name, tmp_path):
    """Bit for bit: the processes have nothing to tell one another."""
    _, source, fields, arguments = SCENARIOS[name]
    state = outcome(outcomes, name)[0]["state"]
    for block in range(2):
        job = made(source, fields, resident_blocks=[block])
        trainer_of(job, source, tmp_path / str(block), {**arguments, "block_parallel": False}).train()
        assert all(torch.equal(tensor, state[key]) for key, tensor in job.state_dict().items())


def test_block_parallel_with_several_processes_a_block(outcomes, tmp_path):
    _, source, fields, arguments = SCENARIOS["blocks of four"]
    state = outcome(outcomes, "blocks of four")[0]["state"]
    for block in range(2):
        job = made(source, fields, resident_blocks=[block])
        trainer_of(job, source, tmp_path / str(block), {**arguments, "block_parallel": False}, batch=2 * BATCH).train()
        assert_close({key: state[key] for key in job.state_dict()}, job.state_dict(), tolerance=1e-5)


def test_a_process_with_two_blocks_trains_them_in_turn(outcomes, tmp_path):
    name = "two blocks a process"
    _, source, fields, arguments = SCENARIOS[name]
    state = outcome(outcomes, name)[0]["state"]
    for lane in ([0, 1], [2, 3]):
        job = made(source, fields, resident_blocks=lane)
        trainer_of(job, source, tmp_path / str(lane), {**arguments, "block_parallel": False}).train()
        assert all(torch.equal(tensor, state[key]) for key, tensor in job.state_dict().items())


@pytest.mark.parametrize("name", [name for name in BLOCKS if "trained" in name or "carried" in name])
def test_block_parallel_steps_all_blocks_at_once(outcomes, name, tmp_path):
    """Slow reference: each step's gradients of both blocks from the same weights; the shared ones' mean over blocks."""
    _, source, fields, arguments = SCENARIOS[name]
    model = made(source, fields)
    batches = list(trainer_of(model, source, tmp_path, {}).get_train_dataloader())[:STEPS]
    trainer = trainer_of(model, source, tmp_path, {})
    model.train()
    for step, batch in enumerate(batches):
        trainer.state.global_step, trainer._micro_batch = step, 0
        gradients = {}
        for block in range(2):
            shared = [parameter for parameter in model.shared_parameters() if parameter.requires_grad]
            moved = [*model.block_parameters(block), *shared]
            loss = model(**batch, block_index=block, generator=trainer.noise_generators(0, BATCH)).loss
            for parameter, gradient in zip(moved, torch.autograd.grad(loss, moved, allow_unused=True)):
                if gradient is not None:
                    share = gradient / 2 if any(parameter is each for each in shared) else gradient
                    gradients[parameter] = gradients.get(parameter, 0) + share
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        scale = min(1.0, arguments["max_grad_norm"] / (norm.item() + 1e-6)) * arguments["learning_rate"] * (1 - step / STEPS)
        with torch.no_grad():
            for parameter, gradient in gradients.items():
                parameter -= scale * gradient
    assert_close(outcome(outcomes, name)[0]["state"], model.state_dict(), tolerance=1e-5)


def test_nothing_is_communicated_where_nothing_is_shared(outcomes):
    """But the weights of the trained blocks, once, at the end; with trained shared parameters, at every step."""
    weights = len(list(made(GPT2, INDEPENDENT).parameters()))
    start = weights + 1  # and the fixed targets
    assert [rank["calls"] for rank in outcome(outcomes, "blocks, own shared")] == [start + weights] * 2
    assert outcome(outcomes, "blocks, trained shared")[0]["calls"] > start + weights


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(outcomes, name):
    for rank, expected in enumerate(outcome(outcomes, name)):
        resumed = torch.load(outcomes / f"{name}.resumed.{rank}.pt", weights_only=True)
        assert all(torch.equal(resumed[key], expected["state"][key]) for key in resumed)


def test_killed_while_saving_and_resumed_is_the_uninterrupted_run(outcomes, tmp_path):
    name = "blocks, carried"
    run = launch(2, str(SCRIPT), str(tmp_path), "--saving", name)
    folder = tmp_path / f"{name}-killed"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-1").is_dir() or not (folder / "_saving").is_dir():  # in its second save, or third
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    launcher = psutil.Process(run.pid)
    for process in (*launcher.children(recursive=True), launcher):  # each worker has a session of its own
        process.send_signal(signal.SIGKILL)
    run.wait()
    for path in folder.glob("checkpoint-*"):
        assert {"optimizer.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in path.iterdir()}
    launched(2, str(SCRIPT), str(tmp_path), "--saving", name)
    for rank, expected in enumerate(outcome(outcomes, name)):
        resumed = torch.load(tmp_path / f"{name}.killed.{rank}.pt", weights_only=True)
        assert all(torch.equal(resumed[key], expected["state"][key]) for key in resumed)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_saved_model_has_all_blocks(outcomes, name):
    saved = db.DiffusionBlocksForCausalLM.from_pretrained if SCENARIOS[name][1] is GPT2 else (
        db.DiffusionBlocksForImageClassification.from_pretrained
    )
    model, expected = saved(outcomes / name), outcome(outcomes, name)[0]["state"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    steps = SCENARIOS[name][3].get("max_steps", STEPS)
    assert sum(model.config.training_report["updates_per_block"]) == 2 * steps


# ---- one block, sharded

FSDP = (
    "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_state_dict_type FULL_STATE_DICT "
    "--fsdp_cpu_ram_efficient_loading false"
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launched(2, str(SCRIPT), str(folder), "--sharded", *SHARDED, options=FSDP)
    return folder


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_processes_of_a_sharded_job_leave_their_groups(sharded):
    assert_that_groups_are_left(sharded, 2)


@pytest.mark.parametrize("family", SHARDED)
def test_a_sharded_job_trains_as_one_process_does(sharded, family, tmp_path):
    source, fields, block = SHARDED[family]
    model = made(source, fields, [block])
    trainer_of(model, source, tmp_path, {**SHARDED_JOB, "save_strategy": "no"}, batch=2 * BATCH).train()
    saved = type(model).from_pretrained(sharded / family / "final", resident_blocks=[block])
    assert_close(saved.state_dict(), model.state_dict(), tolerance=1e-5)


@pytest.mark.parametrize("family", SHARDED)
def test_each_process_holds_its_share(sharded, family):
    for rank in range(2):
        sizes = torch.load(sharded / f"{family}.{rank}.pt")
        assert sizes["held"] == pytest.approx(sizes["whole"] / 2, rel=0.05)


@pytest.mark.parametrize("family", SHARDED)
def test_a_resumed_sharded_job_is_the_uninterrupted_one(sharded, family):
    final, resumed = (
        {name: tensor for path in sorted((sharded / family / kind).glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for kind in ("final", "resumed")
    )
    assert final.keys() == resumed.keys() and all(torch.equal(final[name], resumed[name]) for name in final)


# ---- who trains what


@pytest.mark.parametrize(
    "blocks, world, lanes, replicas",
    [([0, 1], 1, [[0, 1]], 1), ([0, 1], 2, [[0], [1]], 1), ([0, 1, 2, 3], 2, [[0, 1], [2, 3]], 1), ([1, 3], 4, [[1], [3]], 2)],
)
def test_blocks_are_dealt_out(blocks, world, lanes, replicas):
    layouts = [Layout(blocks, world, rank, block_parallel=True) for rank in range(world)]
    assert [layout.blocks for layout in layouts] == [lane for lane in lanes for _ in range(replicas)]
    assert [layout.replica for layout in layouts] == [*range(replicas)] * len(lanes)
    assert all(layouts[layouts[0].owner(block)].blocks.count(block) for block in blocks)


@pytest.mark.parametrize("num_blocks, world", [(2, 3), (3, 2), (4, 6)])
def test_blocks_that_cannot_be_dealt_out_are_refused(num_blocks, world):
    with pytest.raises(ValueError, match=f"block_parallel=True with {world} processes and blocks"):
        Layout(range(num_blocks), world, 0, block_parallel=True)


def _average_with_a_frozen_block(rank: int, folder: Path) -> None:
    """Lane 0 trains a block without trained parameters, lane 1 one that has some; gradients are the ranks' numbers."""
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=4, **meeting)
    layout = Layout([0, 1], 4, rank, block_parallel=True)
    own, shared = [torch.nn.Parameter(torch.zeros(2)) for _ in range(layout.lane)], [torch.nn.Parameter(torch.zeros(2))]
    for parameter in (*own, *shared):
        parameter.grad = torch.full((2,), float(rank))
    layout.average_gradients(own, shared)
    means = [parameter.grad.clone() for parameter in (*own, *shared)]
    norm = layout.clip_gradients(own, shared, 1.0)
    torch.save((means, norm, [parameter.grad for parameter in (*own, *shared)]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_lane_whose_block_is_frozen_averages_what_is_shared(tmp_path):
    torch.multiprocessing.start_processes(_average_with_a_frozen_block, (tmp_path,), nprocs=4, start_method="fork")
    norm = math.sqrt(2 * 2.5**2 + 2 * 1.5**2)
    for rank in range(4):
        means, total, clipped = torch.load(tmp_path / f"{rank}.pt")
        assert [mean.tolist() for mean in means] == ([[2.5, 2.5]] if rank >= 2 else []) + [[1.5, 1.5]]
        assert total.item() == pytest.approx(norm)
        for mean, gradient in zip(means, clipped):
            torch.testing.assert_close(gradient, mean / norm, rtol=1e-5, atol=0)


# ---- what is refused


class Sharding(dict):
    """Stands in for Accelerate's plugin, which there is on accelerators only."""

    __getattr__ = dict.__getitem__


OWN_BLOCK = {"fields": INDEPENDENT, "arguments": {}, "blocks": [1]}


@pytest.mark.parametrize(
    "case, message",
    [
        ({"fields": {}, "arguments": {}, "fsdp": {}}, r"FSDP with train_blocks=\[0, 1\]"),
        ({**OWN_BLOCK, "fsdp": {"fsdp_version": 1}}, "fsdp_version=1 must be 2"),
        ({**OWN_BLOCK, "fsdp": {"cpu_ram_efficient_loading": True}}, "fsdp_cpu_ram_efficient_loading=True must be False"),
        ({**OWN_BLOCK, "fields": {"shared": "per_block"}, "fsdp": {}}, "FSDP with denoiser='joint'"),
        (
            {"fields": {}, "arguments": {"train_shared": False}, "blocks": [1], "fsdp": {}},
            "FSDP with embeddings tied to the head",
        ),
        ({**OWN_BLOCK, "blocks": [0], "fsdp": {}}, "FSDP with embeddings tied to the head"),
        ({**OWN_BLOCK, "source": VIT, "fsdp": {}}, "FSDP with model_type='vit'"),
        ({**OWN_BLOCK, "arguments": {"ema_decay": 0.9}, "fsdp": {}}, "FSDP with ema_decay=0.9"),
    ],
    ids=str,
)
def test_what_cannot_be_sharded_is_refused(case, message, tmp_path, monkeypatch):
    source = case.get("source", GPT2)
    trainer = trainer_of(made(source, case["fields"], case.get("blocks")), source, tmp_path, case["arguments"])
    plugin = Sharding({"fsdp_version": 2, "cpu_ram_efficient_loading": False, **case["fsdp"]})
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    with pytest.raises(ValueError, match=message):
        check_processes(trainer, trainer.layout)


def test_half_precision_with_a_loss_scale_for_each_block_is_refused(tmp_path):
    trainer = trainer_of(made(GPT2, {}), GPT2, tmp_path, {"block_parallel": True})
    trainer.args.mixed_precision = "fp16"
    with pytest.raises(ValueError, match="fp16=True cannot be combined with block_parallel=True"):
        check_processes(trainer, Layout([0, 1], 2, 0, block_parallel=True))


def test_data_without_a_length_is_refused_for_blocks_in_parallel(tmp_path):
    trainer = trainer_of(made(GPT2, {}), GPT2, tmp_path, {"block_parallel": True})
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset=IterableDataset must have a length"):
        check_processes(trainer, Layout([0, 1], 2, 0, block_parallel=True))


def test_rows_that_one_process_deals_out_are_refused_for_blocks_in_parallel(tmp_path):
    dispatch = {"accelerator_config": {"dispatch_batches": True}}
    trainer = trainer_of(made(GPT2, {}), GPT2, tmp_path, {"block_parallel": True, **dispatch})
    with pytest.raises(ValueError, match="dispatch_batches=True must be False or None with block_parallel=True"):
        check_processes(trainer, Layout([0, 1], 2, 0, block_parallel=True))
