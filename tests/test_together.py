"""block_schedule='together': every step trains all blocks, one after another, each alone with its gradients."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from families import watching
from process_scenarios import DIT, GPT2, VIT, made, rows, trainer_of
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.ways import Way, Workload

B, STEPS = 4, 5
CARRIED = {"num_blocks": B, "preset": "recommended", "local_head_layers": 0}
SOURCES = {"gpt2": GPT2, "vit": VIT}
TOGETHER = {"block_schedule": "together"}
#: (Without its epsilon, AdamW makes signs of what is nearly nothing.)
UNCLIPPED = {"max_grad_norm": 0.0, "adam_epsilon": 1e-3}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]


def data(source):
    """Rows whose first token has no label: the stock Trainer would count it where a model's name is not as it expects."""
    found = rows(source)
    if source in (VIT, DIT):
        return found
    labels = found["labels"][:].clone()
    labels[:, 0] = -100
    return found.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def trained(
    model, source, folder, arguments: dict, callback: TrainerCallback | None = None, dataset=None
) -> db.DiffusionBlocksTrainer:
    """Of the source's data, or of others."""
    arguments = {"max_steps": STEPS, "weight_decay": 0.1, **UNCLIPPED, **arguments}
    trainer = trainer_of(model, source, folder, arguments)
    trainer.train_dataset = dataset or data(source)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def stock_trained(plain, source, folder, batch_size: int, arguments: dict, dataset=None) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=STEPS, weight_decay=0.1, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        per_device_train_batch_size=batch_size, report_to=[], disable_tqdm=True, **{**UNCLIPPED, **arguments},
    )  # fmt: skip
    trainer = Trainer(model=plain, args=args, train_dataset=dataset or data(source))
    trainer.train()
    return trainer


def assert_same(model, other, tolerance: float = 0.0) -> None:
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


# ---- one block: end-to-end training

ONE = {**CARRIED, "num_blocks": 1}


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 3}, {"activation_checkpointing": True}], ids=str)
def test_one_block_is_end_to_end_training_of_the_stock_model(source, arguments, tmp_path):
    """After several steps in float64 (the loss is float32)."""
    model = made(source, ONE).double()
    plain = copy.deepcopy(model.to_plain())
    trainer = trained(model, source, tmp_path, {**TOGETHER, **arguments})
    both = {name: value for name, value in arguments.items() if name != "activation_checkpointing"}
    reference = stock_trained(plain, source, tmp_path, trainer.args.per_device_train_batch_size, both)
    assert_same(model.to_plain(), plain, tolerance=2e-6)  # of moves of 1e-2 a step
    logs = [of.state.log_history for of in (trainer, reference)]
    assert logs[0][-1]["train_loss"] == pytest.approx(logs[1][-1]["train_loss"], rel=1e-6)


def test_a_short_micro_batch_counts_by_its_rows(source, tmp_path):
    """The last of an epoch's: 2, 2 and 1 rows are a step."""
    model, rows = made(source, ONE).double(), data(source).select(range(5))
    plain = copy.deepcopy(model.to_plain())
    trained(model, source, tmp_path, {**TOGETHER, "gradient_accumulation_steps": 3}, dataset=rows)
    stock_trained(plain, source, tmp_path, 2, {"gradient_accumulation_steps": 3}, dataset=rows)
    assert_same(model.to_plain(), plain, tolerance=2e-6)


def test_data_without_a_length_accumulate_as_in_the_stock_trainer(source, tmp_path):
    """What is left of an epoch, here a row, is part of the next step."""
    model, rows = made(source, ONE).double(), data(source).select(range(5)).to_iterable_dataset()
    plain = copy.deepcopy(model.to_plain())
    trained(model, source, tmp_path, {**TOGETHER, "gradient_accumulation_steps": 2}, dataset=rows)
    stock_trained(plain, source, tmp_path, 2, {"gradient_accumulation_steps": 2}, dataset=rows)
    assert_same(model.to_plain(), plain, tolerance=2e-6)


def test_embedded_tokens_train_as_tokens_do(tmp_path):
    """All but the embeddings, which these do not reach."""
    models = [made(GPT2, {**CARRIED, "shared": "common"}).double() for _ in range(2)]
    embed = models[0].get_input_embeddings().weight.detach().clone()
    texts = [{"inputs_embeds": embed[row["input_ids"]], "labels": row["labels"]} for row in data(GPT2)]
    for model, dataset in zip(models, (texts, None)):
        trained(model, GPT2, tmp_path, {**TOGETHER, "train_shared": False}, dataset=dataset)
    assert_same(*models, tolerance=1e-12)


# ---- a slow reference


@pytest.mark.parametrize("fields", [{}, {"shared": "per_block"}, {"local_head_layers": 1}], ids=str)
def test_it_is_a_loop_over_blocks_by_hand(source, fields, tmp_path):
    """Each block is moved by its own loss on what the earlier ones put out before they moved; what is shared, by the sum."""
    model = made(source, {**CARRIED, **fields}).double()
    slow, seen = copy.deepcopy(model).train(), []
    arguments = {"max_steps": STEPS, "gradient_accumulation_steps": 2, **UNCLIPPED, **TOGETHER}
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
                    **batch, block_index=block.index,
                    block_input=slow.passed_on(slow.blocks[block.index - 1], batch) if block.index else None,
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
    trainer = trained(model, source, tmp_path, {**TOGETHER, "max_steps": -1, "updates_per_block": 3})
    assert trainer.state.global_step == 3
    moved = {model.block_of_parameter(name) for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert {0, 1} <= moved


# ---- what every way to train has


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    extra = {"ema_decay": 0.9, "bf16": True}
    arguments = {**TOGETHER, **extra, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(made(GPT2, CARRIED), GPT2, tmp_path / "run", arguments)
    model = made(GPT2, CARRIED)
    again = trainer_of(model, GPT2, tmp_path / "run", {**arguments, "restore_callback_states_from_checkpoint": True})
    again.train_dataset = data(GPT2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(whole.model, model)
    with whole.averaged_weights(), again.averaged_weights():
        assert_same(whole.model, model)


RANDOM = {"block_schedule": "random"}


@pytest.mark.parametrize(
    "before, after, message",
    [
        (RANDOM, {}, "block_schedule='together' must be 'random'"),
        (TOGETHER, RANDOM, "block_schedule='random' must be 'together'"),
        (RANDOM, {**RANDOM, "train_blocks": [0, 1], "train_shared": False}, r"train_blocks=\[0, 1\] must be \[0, 1, 2, 3\]"),
        (RANDOM, {**RANDOM, "seed": 1}, "seed=1 must be 42"),
        (TOGETHER, {**TOGETHER, "train_shared": False}, "train_shared=False must be True"),
    ],
)  # fmt: skip
def test_a_run_resumes_as_it_was_stopped(before, after, message, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(made(GPT2, CARRIED), GPT2, tmp_path, {**arguments, **before})
    again = trainer_of(made(GPT2, CARRIED), GPT2, tmp_path, {**arguments, **after})
    with pytest.raises(ValueError, match=f"{message}, as in the run that is resumed from step 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_layers_of_a_block_that_does_not_train_are_cast_too(tmp_path):
    """bf16: Accelerate casts in `forward`, where these do not run."""
    model, dtypes = made(GPT2, CARRIED), set()
    for layer in model.backbone.transformer.h:
        layer.mlp.c_fc.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
    trained(model, GPT2, tmp_path, {**TOGETHER, "bf16": True, "max_steps": 1, "train_blocks": [1, 2], "train_shared": False})
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("schedule", ["random", "together"])
def test_a_trainer_trains_again(schedule, tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {"block_schedule": schedule})
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert not torch.equal(
        before["backbone.transformer.h.0.mlp.c_fc.weight"],
        trainer.model.state_dict()["backbone.transformer.h.0.mlp.c_fc.weight"],
    )


def test_averages_move_with_their_parameters(tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {**TOGETHER, "ema_decay": 0.9})
    assert set(trainer.averages.updates.values()) == {STEPS}


def test_the_log_and_the_card_say_so(tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {**TOGETHER, "max_steps": 1})
    named = {name for name in trainer.state.log_history[0] if name.startswith("loss_block")}
    assert named == {f"loss_block_{k}" for k in range(B)}
    trainer.save_model()
    assert "- block schedule: together" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_the_log_has_the_norm_of_all_gradients(limit, tmp_path):
    """Before each block's was clipped by its own."""
    model, rows = made(GPT2, {**CARRIED, "num_blocks": 1}), data(GPT2)
    plain, arguments = model.to_plain(), {"max_grad_norm": limit}
    ours = trained(model, GPT2, tmp_path, {**TOGETHER, **arguments}, dataset=rows)
    stock = stock_trained(plain, GPT2, tmp_path, 2, {**arguments, "logging_steps": 1}, dataset=rows)
    norms = [of.state.log_history[0]["grad_norm"] for of in (ours, stock)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("schedule", ["together", "random"])
@pytest.mark.parametrize("limit, clipped", [(1e-3, True), (0.0, False), (-1.0, False)])
def test_blocks_are_clipped_by_their_own_norms(limit, clipped, schedule, tmp_path):
    model = made(GPT2, CARRIED)
    before = [[p.detach().clone() for p in model.block_parameters(k)] for k in range(B)]
    steps = 1 if schedule == "together" else B
    arguments = {"block_schedule": schedule, "max_steps": steps, "optim": "sgd", "weight_decay": 0.0, "max_grad_norm": limit}
    trained(model, GPT2, tmp_path, {**arguments, "train_shared": False, "lr_scheduler_type": "constant"})
    for k in range(B):
        moves = [after - start for after, start in zip(model.block_parameters(k), before[k])]
        length = torch.stack([move.norm() for move in moves]).norm().item()
        assert (length == pytest.approx(1e-2 * 1e-3, rel=1e-2)) is clipped and length > 0


# ---- what a step holds, block by block


class Watch(TrainerCallback):
    """Notes whose gradients are there as a block moves."""

    def __init__(self, model):
        self.model, self.owners = model, []

    def on_optimizer_step(self, *args, **kwargs):
        named = self.model.named_parameters()
        self.owners.append({self.model.block_of_parameter(name) for name, p in named if p.grad is not None})


def test_blocks_move_one_by_one_and_then_what_they_share(source, tmp_path):
    model = made(source, CARRIED)
    watch = Watch(model)
    trained(model, source, tmp_path, {**TOGETHER, "max_steps": 2}, watch)
    assert watch.owners == 2 * [*({k} for k in range(B)), {None}]


def test_the_ledger_counts_gradients_and_activations_of_one_block(source, tmp_path):
    model = made(source, CARRIED)
    trainer = trained(model, source, tmp_path, TOGETHER)
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    shared = sum(p.nbytes for p in model.shared_parameters())
    plain = trained(made(source, {**CARRIED, "num_blocks": 1}), source, tmp_path, {"max_steps": 2}).ledgers[0].parts
    kept = B * 2 * (12 if source is not VIT else 5) * 32 * 4  # what enters each block, at most
    for k, ledger in trainer.ledgers.items():
        assert ledger.parts.gradients <= sizes[k] + shared
        assert ledger.parts.activations < plain.activations / 2 + kept
    assert plain.gradients == sum(sizes) + shared


def test_the_estimate_s_ledger_is_the_trainer_s(source, tmp_path):
    fields = {name: value for name, value in CARRIED.items() if name != "num_blocks"}
    way = Way("together", fields, together=True)
    expected = ledger_of(way, Workload(source, B, batch_size=2, sequence_length=None if source is VIT else 12))
    ledgers = trained(made(source, CARRIED), source, tmp_path, TOGETHER).ledgers.values()
    assert max(ledger.total for ledger in ledgers) == pytest.approx(expected.total, rel=0.02)


def test_layers_run_once_a_batch(source, tmp_path):
    model = made(source, CARRIED)
    with ExitStack() as stack:
        runs = [stack.enter_context(watching(layer)) for layer in model.layers]
        trained(model, source, tmp_path, {**TOGETHER, "max_steps": 3, "gradient_accumulation_steps": 2})
        assert [len(entered) for entered in runs] == [3 * 2] * B
