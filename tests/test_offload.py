"""Inactive blocks in host memory: the same training, in fewer bytes. "The device" is the CPU: copies are copies, and made as
late as those of a real one may be."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import randomized
from families import Case, grid
from process_scenarios import GPT2, LLAMA, VIT, made, trainer_of
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback

import hf_diffusionblocks as db

pytestmark = pytest.mark.usefixtures("late_copies")
B, STEPS = 4, 10
CARRIED = {"denoiser": "factorized", "context": "carried", "prior_fraction": 0.5}
CASES = {
    "gpt2-carried": (GPT2, CARRIED),
    "gpt2-carried-own": (GPT2, {**CARRIED, "shared": "per_block"}),
    "gpt2-carried-head": (GPT2, {**CARRIED, "readout_layers": 1}),
    "llama-independent-own": (LLAMA, {"denoiser": "factorized", "shared": "per_block"}),
    "gpt2-joint-own": (GPT2, {"shared": "per_block"}),
    "gpt2-joint-carried": (GPT2, {"context": "carried", "readout": "posterior"}),
    "vit-joint-own": (VIT, {"shared": "per_block"}),
    "vit-carried": (VIT, CARRIED),
}


class Watch(TrainerCallback):
    """Notes what blocks have on the device as each step's gradients are there."""

    def __init__(self, look: Callable):
        self.look, self.seen = look, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(self.look())


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def trained(case, folder, **arguments) -> db.DiffusionBlocksTrainer:
    source, fields = case
    arguments = {"max_steps": STEPS, "weight_decay": 0.1, **arguments}
    trainer = trainer_of(made(source, {"num_blocks": B, **fields}), source, folder, arguments)
    trainer.train()
    return trainer


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    others = dict(other.named_parameters())
    return all(torch.equal(parameter, others[name]) for name, parameter in one.named_parameters())


@pytest.mark.parametrize("order", [{"block_switch_interval": 2}, {"block_schedule": "sequential"}], ids=str)
@pytest.mark.parametrize("case", ["gpt2-carried", "vit-joint-own"], indirect=False)
def test_longer_turns_are_the_same_bit_for_bit(case, tmp_path, order):
    """(Turns of one step: test_families_training.py, for every formulation.)"""
    expected = trained(CASES[case], tmp_path / "kept", **order)
    actual = trained(CASES[case], tmp_path / "moved", offload_inactive_blocks="cpu", **order)
    assert same(expected.model, actual.model)
    assert actual.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


@pytest.mark.parametrize("objective", ["local", "exact"])
def test_copies_both_ways_are_made_while_a_block_computes(objective, tmp_path):
    """They are still under way when it is about to move, and waits for them: what has left is the block before, what has come
    are its own state and the block after. A step that begins with the last block has none before it, and what blocks share
    moves without a wait."""
    fields = {"num_blocks": B, **CARRIED, "prior_fraction": 1.0}
    fields |= {"context": "independent"} if objective == "local" else {}
    model = made(GPT2, fields)
    arguments = {"objective": objective, "offload_inactive_blocks": "cpu", "max_steps": 3 * B}
    arguments["block_schedule"] = {"local": "random", "exact": "together"}[objective]
    trainer = trainer_of(model, GPT2, tmp_path, arguments)
    under_way = []
    hook = register_optimizer_step_pre_hook(lambda *_: under_way.append(model.offload._copies.under_way))
    trainer.train()
    hook.remove()
    came, left = {"to device"}, {"to host"}
    moves = {"local": [came | left] * B, "exact": [came, *[came | left] * (B - 1), left]}[objective]
    assert under_way[-len(moves) :] == moves


class State(TrainerCallback):
    """Notes Adam's moments of every block at the end of each step, wherever they are."""

    def __init__(self):
        self.trainer, self.seen = None, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer.state_dict()  # waits for copies
        moments = {
            name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state and model.block_of_parameter(name) is not None
        }
        self.seen.append((self.trainer.active_block, moments))


def test_a_block_comes_back_with_the_optimizer_state_that_it_left_with(tmp_path):
    """Three rounds of turns, at the end of each step, of all blocks; and they count: without Adam's, weights differ."""

    def run(place, forgets=False):
        model = made(GPT2, {"num_blocks": B, **CARRIED})
        trainer = trainer_of(model, GPT2, tmp_path, {"max_steps": 3 * B, "offload_inactive_blocks": place})
        state = State()
        state.trainer = trainer
        trainer.add_callback(state)
        if forgets:
            trainer.add_callback(Watch(lambda: trainer.optimizer.state.clear()))
        trainer.train()
        return model, state.seen

    (kept, expected), (moved, found) = run("none"), run("cpu")
    for (block, moments), (same_block, others) in zip(expected, found):
        assert block == same_block and moments.keys() == others.keys()
        for name, moment in moments.items():
            assert all(torch.equal(value, others[name][key]) for key, value in moment.items()), name
    assert same(kept, moved) and not same(kept, run("none", forgets=True)[0])


@pytest.mark.parametrize("case", ["gpt2-carried", "vit-joint-own"], indirect=False)
def test_evaluation_between_steps_changes_nothing(case, tmp_path):
    expected = trained(CASES[case], tmp_path / "kept")
    actual = trained(
        CASES[case], tmp_path / "moved", offload_inactive_blocks="cpu", eval_strategy="steps", eval_steps=3
    )
    assert same(expected.model, actual.model)


def test_what_is_on_the_device(case, tmp_path):
    """At most the active block, the next one, and (carried context) one that runs forward; state of the first."""
    source, fields = case
    model = made(source, {"num_blocks": B, **fields})
    arguments = {"max_steps": 3 * B, "block_schedule": "random", "offload_inactive_blocks": "cpu"}
    trainer = trainer_of(model, source, tmp_path, arguments)
    residence = model.offload
    assert residence.bytes_on_device() == {"parameters": 0, "optimizer": 0}
    sizes = [sum(p.nbytes for p in model.block_parameters(block)) for block in range(B)]
    def look():
        following = trainer.block_schedule.block_to_fetch(trainer.state.global_step)
        return trainer.active_block, following, residence.bytes_on_device()

    watch = Watch(look)
    trainer.add_callback(watch)
    trainer.train()
    carries = fields.get("context") == "carried"
    for step, (active, following, held) in enumerate(watch.seen):
        needed = sizes[active] + (0 if following is None else sizes[following])
        others = [sizes[block] for block in range(active) if carries and block != following]
        assert held["parameters"] in {needed, *(needed + size for size in others)}
        assert held["optimizer"] <= 2 * sizes[active] + 1000  # and a count of steps each
        if step >= 2 * B:  # every block has been updated
            assert held["optimizer"] >= 2 * sizes[active]
    assert residence.bytes_on_device() == {"parameters": 0, "optimizer": 0}


def test_the_other_way_round_all_blocks_would_be_there(tmp_path):
    """The control: bytes are counted where they are."""
    model = made(GPT2, {"num_blocks": B, **CARRIED})
    trainer = trainer_of(model, GPT2, tmp_path, {"offload_inactive_blocks": "cpu"})
    for block in range(B):
        model.offload.use(block)
        held = model.offload.bytes_on_device()["parameters"]
        assert held == sum(p.nbytes for p in model.block_parameters(block))
    assert trainer.model is model


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "max_steps": 9}
    trainer = trained(
        CASES["gpt2-carried"], tmp_path, offload_inactive_blocks="cpu", load_best_model_at_end=True, **arguments
    )
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("schedule", ["random", "sequential", "together"])
def test_checkpoints_are_those_of_a_run_without(schedule, tmp_path):
    """Of weights, averages of them, and optimizer state, at every step: just as blocks leave and come."""
    objective = "exact" if schedule == "together" else "local"
    arguments = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "ema_decay": 0.9,
        "block_schedule": schedule, "objective": objective,
    }  # fmt: skip
    case = GPT2, {**CARRIED, "prior_fraction": 1.0}
    for place in ("none", "cpu"):
        trained(case, tmp_path / place, offload_inactive_blocks=place, **arguments)
    checkpoints = sorted((tmp_path / "none").glob("checkpoint-*"))
    assert len(checkpoints) == 6
    for kept in checkpoints:
        moved = tmp_path / "cpu" / kept.name
        files = {file.relative_to(kept) for file in kept.rglob("*.safetensors")}
        assert files == {file.relative_to(moved) for file in moved.rglob("*.safetensors")} and len(files) > B
        for file in files:
            assert (kept / file).read_bytes() == (moved / file).read_bytes(), file
        states = [torch.load(folder / "optimizer.pt")["state"] for folder in (kept, moved)]
        assert states[0].keys() == states[1].keys()
        for number, state in states[0].items():
            assert all(torch.equal(value, states[1][number][name]) for name, value in state.items()), number


class Copies(TrainerCallback):
    """Notes the weights of plain copies that are made at the end of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.to_plain().state_dict())


def test_plain_copies_made_meanwhile_have_the_weights_that_there_are(tmp_path):
    found = []
    for place in ("none", "cpu"):
        model = made(GPT2, {"num_blocks": B, **CARRIED, "prior_fraction": 1.0})
        trainer = trainer_of(model, GPT2, tmp_path, {"max_steps": 5, "offload_inactive_blocks": place})
        trainer.add_callback(copies := Copies())
        trainer.train()
        found.append(copies.seen)
    assert len(found[0]) == 5
    for kept, moved in zip(*found):
        assert all(torch.equal(tensor, moved[name]) for name, tensor in kept.items())


def test_weights_written_while_a_block_is_on_the_device_are_there_for_good():
    """An evaluation leaves the last block there."""
    ids = torch.arange(1, 9)[None]
    model, other = (made(GPT2, {"num_blocks": B, **CARRIED}).eval() for _ in range(2))
    randomized(other)
    model.offload_blocks("cpu")
    model(ids)
    model.load_state_dict(other.state_dict())
    for _ in range(2):  # every block comes, and goes
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("schedule", ["random", "together"])
def test_a_resumed_run_is_the_uninterrupted_one_though_it_was_evaluated_before(schedule, tmp_path):
    arguments = {"offload_inactive_blocks": "cpu", "block_schedule": schedule, "max_steps": 4}
    arguments |= {"save_strategy": "steps", "save_steps": 2}
    whole = trained(CASES["gpt2-carried"], tmp_path, **arguments)
    again = trainer_of(made(GPT2, {"num_blocks": B, **CARRIED}), GPT2, tmp_path, {**arguments, "weight_decay": 0.1})
    again.evaluate()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole.model, again.model)


def test_an_offloaded_model_is_saved_whole(tmp_path):
    trainer = trained(CASES["gpt2-carried"], tmp_path, offload_inactive_blocks="cpu")
    trainer.save_model()
    assert same(db.DiffusionBlocksForCausalLM.from_pretrained(tmp_path), trainer.model)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "final"}, {"objective": "final", "activation_checkpointing": True, "bf16": True},
        {"activation_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"activation_checkpointing": True, "bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],  # fmt: skip
    ids=str,
)
def test_it_combines(options, tmp_path):
    expected = trained(CASES["gpt2-carried"], tmp_path / "kept", **options)
    actual = trained(CASES["gpt2-carried"], tmp_path / "moved", offload_inactive_blocks="cpu", **options)
    assert same(expected.model, actual.model)


def test_a_job_around_predecessors_offloads_them(tmp_path):
    fields = {"num_blocks": B, **CARRIED}
    whole, moved = made(GPT2, fields), made(GPT2, fields)
    job = {"train_blocks": [3], "train_shared": False}
    trainer_of(whole, GPT2, tmp_path, job).train()
    trainer = trainer_of(moved, GPT2, tmp_path, {**job, "offload_inactive_blocks": "cpu"})
    watch = Watch(lambda: moved.offload.bytes_on_device()["parameters"])
    trainer.add_callback(watch)
    trainer.train()
    assert same(whole, moved)
    size = sum(p.nbytes for p in moved.block_parameters(0))
    assert set(watch.seen) == {2 * size}  # blocks are of one size: the trained one, and the last that ran


def test_later_blocks_come_for_the_final_loss_one_by_one(tmp_path):
    """As they run, and again, last block first, as they pass the gradient on."""
    model = made(GPT2, {"num_blocks": B, **CARRIED})
    arguments = {"objective": "final", "offload_inactive_blocks": "cpu", "max_steps": B, "block_schedule": "sequential"}
    trainer = trainer_of(model, GPT2, tmp_path, arguments)
    size, residence, seen = sum(p.nbytes for p in model.block_parameters(0)), model.offload, []
    use = residence.use

    def watched(block):
        use(block)
        seen.append((trainer.active_block, block, residence.bytes_on_device()["parameters"] // size))

    residence.use = watched
    trainer.train()
    used = [block for active, block, _ in seen if active == 0]
    assert [block for block, _ in itertools.groupby(used)] == [0, 1, 2, 3, 2, 1]
    assert {held for _, _, held in seen} == {1, 2}  # the active one, and another; none is fetched ahead of its long turn


def answers(model, case: Case) -> dict[str, torch.Tensor]:
    """What a model is used for: evaluation, text, images."""
    with torch.no_grad():
        found = dict(model(**case.rows()))
    if case.task.name == "text-generation":
        found["text"] = model.generate(case.rows()["input_ids"], max_new_tokens=2, do_sample=False)
    if case.task.name == "image-generation":
        found["images"] = model.predict([0, 1], num_inference_steps=4).images
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


@pytest.mark.parametrize(**grid())
def test_inference_in_the_memory_of_one_block(case):
    model = case.model().eval()
    expected = answers(model, case)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.offload_blocks("cpu")
    size, held, use = max(sum(p.nbytes for p in model.block_parameters(k)) for k in case.blocks), [], model.offload.use

    def watched(block):
        use(block)
        held.append(model.offload.bytes_on_device()["parameters"])

    model.offload.use = watched
    found = answers(model, case)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert max(held) == size
    model.offload_blocks(None)
    assert model.offload is None and all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
