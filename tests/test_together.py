"""block_schedule='together': every step trains all blocks, one after another, each alone with its gradients."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from process_scenarios import DIT, GPT2, VIT, arguments_of, made, rows, trainer_of
from together_runs import (
    B, CARRIED, EXACT, LOCAL, STEPS, UNCLIPPED, assert_same, data, objective, source, stock_trained, trained,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.training.checks import check_schedule

pytestmark = pytest.mark.usefixtures("late_copies")

# ---- exact: end-to-end training


ALONE = ("offload_inactive_blocks", "activation_checkpointing")  # that the stock Trainer knows nothing of, or otherwise


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"gradient_accumulation_steps": 3}, {"activation_checkpointing": True},
        {"gradient_accumulation_steps": 2, "offload_inactive_blocks": "cpu", "optim": "sgd"},
    ],
    ids=["", "accumulated", "checkpointed", "offloaded, sgd"],
)  # fmt: skip
def test_exact_is_end_to_end_training_of_the_stock_model(source, arguments, tmp_path):
    """After several steps in float64 (the loss is float32): tied embeddings get the sum, optimizers have the same state."""
    model = made(source, CARRIED).double()
    plain = copy.deepcopy(model.to_plain())
    trainer = trained(model, source, tmp_path, {**EXACT, **arguments})
    both = {name: value for name, value in arguments.items() if name not in ALONE}
    reference = stock_trained(plain, source, tmp_path, trainer.args.per_device_train_batch_size, both)
    assert_same(model.to_plain(), plain, tolerance=2e-6)  # of moves of 1e-2 a step
    losses = [of.state.log_history[-1]["train_loss"] for of in (trainer, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_short_micro_batch_counts_by_its_rows(source, tmp_path):
    """The last of an epoch's: 2, 2 and 1 rows are a step."""
    model, rows = made(source, CARRIED).double(), data(source).select(range(5))
    plain = copy.deepcopy(model.to_plain())
    trained(model, source, tmp_path, {**EXACT, "gradient_accumulation_steps": 3}, dataset=rows)
    stock_trained(plain, source, tmp_path, 2, {"gradient_accumulation_steps": 3}, dataset=rows)
    assert_same(model.to_plain(), plain, tolerance=2e-6)


def test_data_without_a_length_accumulate_as_in_the_stock_trainer(source, tmp_path):
    """What is left of an epoch, here a row, is part of the next step."""
    model, rows = made(source, CARRIED).double(), data(source).select(range(5)).to_iterable_dataset()
    plain = copy.deepcopy(model.to_plain())
    trained(model, source, tmp_path, {**EXACT, "gradient_accumulation_steps": 2}, dataset=rows)
    stock_trained(plain, source, tmp_path, 2, {"gradient_accumulation_steps": 2}, dataset=rows)
    assert_same(model.to_plain(), plain, tolerance=2e-6)


def test_exact_takes_embedded_tokens(tmp_path):
    model = made(GPT2, CARRIED).double()
    plain = copy.deepcopy(model.to_plain())
    embed = plain.get_input_embeddings().weight.detach().clone()
    texts = [{"inputs_embeds": embed[row["input_ids"]], "labels": row["labels"]} for row in data(GPT2)]
    trained(model, GPT2, tmp_path, EXACT, dataset=texts)
    stock_trained(plain, GPT2, tmp_path, 2, {}, dataset=texts)
    assert_same(model.to_plain(), plain, tolerance=2e-6)


def test_exact_for_some_blocks_is_end_to_end_training_of_these(source, tmp_path):
    model = made(source, CARRIED).double()
    reference = copy.deepcopy(model)
    trained(model, source, tmp_path, {**EXACT, "train_blocks": [1, 2], "train_shared": False})
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(reference.block_of_parameter(name) in (1, 2))
    trained(reference, source, tmp_path, EXACT)
    assert_same(model, reference, tolerance=1e-12)
    assert not torch.equal(model.block_parameters(1)[0], made(source, CARRIED).double().block_parameters(1)[0])


def test_dropout_repeats_between_the_two_runs_of_a_block(tmp_path):
    source = copy.deepcopy(GPT2)
    source.resid_pdrop = source.embd_pdrop = 0.5
    model, runs = made(source, CARRIED), {}
    trainer = trainer_of(model, GPT2, tmp_path, {"max_steps": 2, "gradient_accumulation_steps": 2, **EXACT})
    run = trainer._together._run

    def noted(k, m, inputs):
        hidden = run(k, m, inputs)
        runs.setdefault((trainer.state.global_step, k, m), []).append(hidden.detach().clone())
        return hidden

    trainer._together._run = noted
    trainer.train()
    assert [len(of) for of in runs.values()].count(2) == 2 * 2 * (B - 1)  # (the last block runs once)
    assert all(torch.equal(of[0], of[-1]) for of in runs.values())
    assert not torch.equal(runs[0, 0, 0][0] == 0, runs[0, 0, 1][0] == 0)  # micro-batches differ, and so do steps
    assert not torch.equal(runs[0, 0, 0][0] == 0, runs[1, 0, 0][0] == 0)


# ---- local: a slow reference


@pytest.mark.parametrize("fields", [{}, {"shared": "per_block"}, {"readout_layers": 1}], ids=str)
def test_local_is_a_loop_over_blocks_by_hand(source, fields, tmp_path):
    """Each block is moved by its own loss on what the earlier ones put out before they moved; what is shared, by the sum."""
    model = made(source, {**CARRIED, **fields}).double()
    slow, seen = copy.deepcopy(model).train(), []
    arguments = {"max_steps": STEPS, "gradient_accumulation_steps": 2, **UNCLIPPED, **LOCAL}
    trainer = trainer_of(model, source, tmp_path, arguments)
    step = trainer._together.training_step
    trainer._together.training_step = lambda *given: seen.append(given) or step(*given)
    trainer.train()
    optimizer = torch.optim.AdamW(slow.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    for number in range(STEPS):
        batches = seen[2 * number : 2 * number + 2]
        for batch, num_items in batches:
            for block in slow.blocks:
                loss = slow(
                    **batch, block_index=block.index, sigma=torch.full((2,), slow.config.sigma_max),
                    block_input=slow.passed_on(block, slow.clean_input(batch)) if block.index else None,
                    **({"num_items_in_batch": num_items} if slow.accepts_loss_kwargs else {}),
                ).loss  # fmt: skip
                (loss if slow.accepts_loss_kwargs else loss / 2).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, slow, tolerance=2e-6)


@pytest.mark.parametrize("source, fields", [(GPT2, {"shared": "per_block"}), (DIT, {"shared": "per_block"}), (VIT, {})])
def test_independent_blocks_train_together_too(source, fields, tmp_path):
    model = made(source, fields)
    before = copy.deepcopy(model.state_dict())
    trainer = trained(model, source, tmp_path, {**LOCAL, "max_steps": -1, "updates_per_block": 3})
    assert trainer.state.global_step == 3
    moved = {model.block_of_parameter(name) for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert {0, 1} <= moved


# ---- what every way to train has


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9, "bf16": True, "offload_inactive_blocks": "cpu"}], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one(objective, extra, tmp_path):
    arguments = {**objective, **extra, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(made(GPT2, CARRIED), GPT2, tmp_path / "run", arguments)
    model = made(GPT2, CARRIED)
    again = trainer_of(model, GPT2, tmp_path / "run", {**arguments, "restore_callback_states_from_checkpoint": bool(extra)})
    again.train_dataset = data(GPT2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(whole.model, model)
    with whole.averaged_weights(), again.averaged_weights():
        assert_same(whole.model, model)


RANDOM = {"block_schedule": "random", "objective": "local"}
IN_TURN = {"block_schedule": "sequential", "objective": "local"}


@pytest.mark.parametrize(
    "before, after, message",
    [
        (RANDOM, {"objective": "local"}, "block_schedule='together' must be 'random'"),
        (LOCAL, RANDOM, "block_schedule='random' must be 'together'"),
        (RANDOM, IN_TURN, "block_schedule='sequential' must be 'random'"),
        (EXACT, LOCAL, "objective='local' must be 'exact'"),
        (RANDOM, {**RANDOM, "block_switch_interval": 2}, "block_switch_interval=2 must be 1"),
        (RANDOM, {**RANDOM, "train_blocks": [0, 1], "train_shared": False}, r"train_blocks=\[0, 1\] must be \[0, 1, 2, 3\]"),
        (IN_TURN, {**IN_TURN, "max_steps": 8}, "max_steps=8 must be 4"),
        (RANDOM, {**RANDOM, "seed": 1}, "seed=1 must be 42"),
        (EXACT, {**EXACT, "train_shared": False}, "train_shared=False must be True"),
    ],
)  # fmt: skip
def test_a_run_resumes_as_it_was_stopped(before, after, message, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(made(GPT2, CARRIED), GPT2, tmp_path, {**arguments, **before})
    again = trainer_of(made(GPT2, CARRIED), GPT2, tmp_path, {**arguments, **after})
    with pytest.raises(ValueError, match=f"{message}, as in the run that is resumed from step 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_layers_are_cast_as_in_turns(objective, tmp_path):
    """bf16: Accelerate casts in `forward`, where these layers do not run."""
    model, dtypes = made(GPT2, CARRIED), set()
    for layer in model.backbone.transformer.h:
        layer.mlp.c_fc.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
    trained(model, GPT2, tmp_path, {**objective, "bf16": True, "max_steps": 1})
    assert dtypes == {torch.bfloat16}


def test_dropout_differs_between_blocks(tmp_path):
    source, dropped = copy.deepcopy(GPT2), []
    source.resid_pdrop = 0.5
    model = made(source, CARRIED)
    for layer in model.backbone.transformer.h:
        layer.mlp.dropout.register_forward_hook(lambda module, given, output: dropped.append(output == 0))
    trained(model, GPT2, tmp_path, {**EXACT, "max_steps": 1})
    first = dropped[: B - 1]  # of the forward pass
    assert not any(torch.equal(one, other) for k, one in enumerate(first) for other in first[:k])


@pytest.mark.parametrize("schedule", ["random", "together"])
def test_a_trainer_trains_again(schedule, tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {"offload_inactive_blocks": "cpu", "block_schedule": schedule})
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert not torch.equal(before["backbone.transformer.h.0.mlp.c_fc.weight"], trainer.model.state_dict()["backbone.transformer.h.0.mlp.c_fc.weight"])


def test_a_job_on_cached_inputs_is_no_matter_for_it(tmp_path):
    """A pretrained preset's objective is exact; one block trains by itself, then, and who asks for more is told."""
    model = made(GPT2, {**CARRIED, "objective": "exact"})
    cached = db.cache_block_inputs(model, rows(GPT2).with_format(None), B - 1, tmp_path / "cached")
    job = made(GPT2, {**CARRIED, "objective": "exact"}, resident_blocks=[B - 1])
    for schedule in (None, "together"):
        args = arguments_of(tmp_path, {"train_shared": False, "max_steps": 1, "block_schedule": schedule})
        if schedule:
            with pytest.raises(ValueError, match=f"with the column 'input_of_block_{B - 1}'"):
                db.DiffusionBlocksTrainer(model=job, args=args, train_dataset=cached)
        else:
            db.DiffusionBlocksTrainer(model=job, args=args, train_dataset=cached).train()


def test_averages_move_with_their_parameters(objective, tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {**objective, "ema_decay": 0.9})
    assert set(trainer.averages.updates.values()) == {STEPS}


def adapters_of(model) -> dict[str, torch.Tensor]:
    """By layer and part."""
    return {re.sub(r".*\.h\.|\.(block_\d|default)", "", name): p for name, p in model.named_parameters() if "lora_" in name}


def test_the_log_and_the_card_say_so(objective, tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {**objective, "max_steps": 1})
    named = {name for name in trainer.state.log_history[0] if name.startswith("loss_block")}
    assert named == {f"loss_block_{k}" for k in (range(B) if objective is LOCAL else [B - 1])}
    trainer.save_model()
    assert "- block schedule: together" in (tmp_path / "README.md").read_text()


def test_fp16_of_the_launcher_has_blocks_take_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert arguments_of(tmp_path, {}).in_turn


@pytest.mark.parametrize(
    "source, fields, arguments, message",
    [
        (GPT2, CARRIED, {**EXACT, "block_schedule": "random"}, "block_schedule='random' with objective='exact' must be 'together'"),
        (GPT2, CARRIED, {**EXACT, "objective": "final"}, "objective='final' with block_schedule='together' must be 'exact'"),
        (GPT2, CARRIED, {**LOCAL, "block_parallel": True}, "block_schedule='together' with block_parallel=True"),
        (GPT2, {"context": "carried"}, LOCAL, "needs denoiser='factorized'.*joint, carried, text-generation"),
        (GPT2, {"denoiser": "factorized"}, EXACT, "objective='exact' needs denoiser='factorized' and context='carried'"),
        (GPT2, CARRIED, {**EXACT, "fp16": True}, "block_schedule='together' with fp16=True"),
    ],
)  # fmt: skip
def test_what_it_needs_is_said(source, fields, arguments, message, tmp_path):
    model = made(source, fields)
    with pytest.raises(ValueError, match=message):
        args = trainer_of(model, source, tmp_path, {**arguments, "fp16": False}).args
        args.mixed_precision = "fp16" if arguments.get("fp16") else "no"  # (the CPU has none)
        check_schedule(model, args, None)
