"""block_schedule='together': every step trains all blocks, one after another, each alone with its gradients."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from process_scenarios import DIT, GPT2, LLAMA, VIT, arguments_of, made, rows, trainer_of
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks import lora
from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.traffic import traffic
from hf_diffusionblocks.memory.ways import Way, Workload
from hf_diffusionblocks.training.checks import check_schedule

B, STEPS = 4, 5
CARRIED = {"num_blocks": B, "denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
SOURCES = {"gpt2": GPT2, "llama": LLAMA, "vit": VIT}
EXACT = {"block_schedule": "together", "objective": "exact"}
#: (Without its epsilon, AdamW makes signs of what is nearly nothing.)
UNCLIPPED = {"max_grad_norm": 0.0, "adam_epsilon": 1e-3}
LOCAL = {"block_schedule": "together", "objective": "local"}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]


@pytest.fixture(params=[EXACT, LOCAL], ids=["exact", "local"])
def objective(request):
    return request.param


def data(source):
    """Rows whose first token has no label: the stock Trainer would count it where a model's name is not as it expects."""
    found = rows(source)
    if source in (VIT, DIT):
        return found
    labels = found["labels"][:].clone()
    labels[:, 0] = -100
    return found.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def trained(model, source, folder, arguments: dict, callback: TrainerCallback | None = None) -> db.DiffusionBlocksTrainer:
    arguments = {"max_steps": STEPS, "weight_decay": 0.1, **UNCLIPPED, **arguments}
    trainer = trainer_of(model, source, folder, arguments)
    trainer.train_dataset = data(source)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def stock_trained(plain, source, folder, batch_size: int, arguments: dict) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=STEPS, **UNCLIPPED, weight_decay=0.1, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        per_device_train_batch_size=batch_size, report_to=[], disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = Trainer(model=plain, args=args, train_dataset=data(source))
    trainer.train()
    return trainer


def assert_same(model, other, tolerance: float = 0.0) -> None:
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


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


# ---- one block at a time


class Watch(TrainerCallback):
    """Notes whose gradients are there, and what blocks have on the device, as a block moves."""

    def __init__(self, model):
        self.model, self.owners, self.on_device = model, [], []

    def on_optimizer_step(self, *args, **kwargs):
        named = self.model.named_parameters()
        self.owners.append({self.model.block_of_parameter(name) for name, p in named if p.grad is not None})
        if self.model.offload is not None:
            self.on_device.append(self.model.offload.bytes_on_device())


def test_blocks_move_one_by_one_and_then_what_they_share(source, objective, tmp_path):
    model = made(source, CARRIED)
    watch = Watch(model)
    trained(model, source, tmp_path, {**objective, "max_steps": 2}, watch)
    order = [{k} for k in range(B)]
    assert watch.owners == 2 * [*(reversed(order) if objective is EXACT else order), {None}]


def test_the_ledger_counts_gradients_and_activations_of_one_block(source, objective, tmp_path):
    """And, where others are in host memory, optimizer state of one."""
    model = made(source, CARRIED)
    trainer = trained(model, source, tmp_path, {**objective, "offload_inactive_blocks": "cpu"}, watch := Watch(model))
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    shared = sum(p.nbytes for p in model.shared_parameters())
    plain = trained(made(source, {**CARRIED, "num_blocks": 1}), source, tmp_path, {"max_steps": 2}).ledgers[0].parts
    kept = B * 2 * (12 if source is not VIT else 5) * 32 * 4  # what enters each block, at most
    for k, ledger in trainer.ledgers.items():
        assert ledger.parts.gradients <= sizes[k] + shared
        assert ledger.parts.optimizer <= 2 * (sizes[k] + shared) + 1000
        assert ledger.parts.activations < plain.activations / 2 + kept
    assert plain.gradients == sum(sizes) + shared
    assert all(held["parameters"] <= 2 * max(sizes) for held in watch.on_device)
    assert model.offload.bytes_on_device() == {"parameters": 0, "optimizer": 0}


@pytest.mark.parametrize("offload", [False, True])
def test_the_estimate_s_ledger_is_the_trainer_s(source, objective, offload, tmp_path):
    fields = {name: value for name, value in CARRIED.items() if name != "num_blocks"}
    way = Way("together", fields, together=True, objective=objective["objective"], offload=offload)
    expected = ledger_of(way, Workload(source, B, batch_size=2, sequence_length=None if source is VIT else 12))
    place = {"offload_inactive_blocks": "cpu" if offload else "none"}
    ledgers = trained(made(source, CARRIED), source, tmp_path, {**objective, **place}).ledgers.values()
    assert max(ledger.total for ledger in ledgers) == pytest.approx(expected.total, rel=0.02)


def test_layers_run_once_a_batch_or_twice(source, objective, tmp_path):
    model, runs = made(source, CARRIED), Counter()
    run, numbers = model._run_layer, {id(layer): k for k, layer in enumerate(l for b in model.blocks for l in b.layers)}

    def counted(layer, *args, **kwargs):
        runs[numbers[id(layer)]] += 1
        return run(layer, *args, **kwargs)

    model._run_layer = counted
    trained(model, source, tmp_path, {**objective, "max_steps": 3, "gradient_accumulation_steps": 2})
    times = {k: 2 if objective is EXACT and k < B - 1 else 1 for k in range(B)}  # (of the last block nothing is dropped)
    assert runs == {k: 3 * 2 * times[k] for k in range(B)}


def test_offloaded_blocks_train_the_same_and_cross_as_the_formula_says(source, objective, tmp_path):
    expected, model = made(source, CARRIED), made(source, CARRIED)
    trained(expected, source, tmp_path, objective)
    seen = []

    class Copied(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(dict(model.offload.copied))

    trained(model, source, tmp_path, {**objective, "offload_inactive_blocks": "cpu"}, Copied())
    assert_same(expected, model)
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    formula = traffic(sizes, [2 * size for size in sizes], objective["objective"], together=True, carried=True)
    counts = 4 * len(list(model.parameters()))  # of Adam's steps, a number each
    for direction, expected_bytes in vars(formula).items():
        assert 0 <= seen[3][direction] - seen[2][direction] - expected_bytes <= counts


@pytest.mark.parametrize("objective_in_turn, fields", [("local", {"context": "independent"}), ("local", {}), ("final", {})], ids=str)
def test_in_turns_no_more_crosses_than_the_formula_says(objective_in_turn, fields, tmp_path):
    """Eight rounds, of which the first has no state; and no less than what trains and comes back."""
    model = made(GPT2, {**CARRIED, **fields})
    arguments = {"objective": objective_in_turn, "block_schedule": "random", "max_steps": 8 * B, "optim": "sgd"}
    arguments["offload_inactive_blocks"] = "cpu"
    trained(model, GPT2, tmp_path, arguments)
    sizes = [sum(p.nbytes for p in model.block_parameters(k)) for k in range(B)]
    formula = traffic(sizes, [0] * B, objective_in_turn, together=False, carried=not fields)
    assert 8 * sum(sizes) * 0.7 < model.offload.copied["to_device"] <= 8 * formula.to_device
    assert 8 * sum(sizes) * 0.7 < model.offload.copied["to_host"] <= 8 * formula.to_host


# ---- what every way to train has


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9, "bf16": True, "offload_inactive_blocks": "cpu"}], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one(objective, extra, tmp_path):
    arguments = {**objective, **extra, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(made(GPT2, CARRIED), GPT2, tmp_path / "run", arguments)
    model = made(GPT2, CARRIED)
    again = trainer_of(model, GPT2, tmp_path / "run", arguments)
    again.train_dataset = data(GPT2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(whole.model, model)
    with whole.averaged_weights(), again.averaged_weights():
        assert_same(whole.model, model)


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


def test_adapters_on_all_blocks(objective, tmp_path):
    model = made(GPT2, CARRIED).double()
    lora.add_block_adapters(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    before = copy.deepcopy(model)
    trained(model, GPT2, tmp_path, {**objective, "train_shared": False})
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(moved) == 2 * B and all("lora_" in name for name in moved)


def adapters_of(model) -> dict[str, torch.Tensor]:
    """By layer and part."""
    return {re.sub(r".*\.h\.|\.(block_\d|default)", "", name): p for name, p in model.named_parameters() if "lora_" in name}


def test_exact_adapters_train_as_stock_lora_s(tmp_path):
    model = made(GPT2, CARRIED).double()
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    plain = get_peft_model(model.to_plain(), copy.deepcopy(config))
    lora.add_block_adapters(model, config)
    start = {name: adapter.detach().clone() for name, adapter in adapters_of(model).items()}
    for name, adapter in adapters_of(plain).items():
        adapter.data.copy_(start[name])
    trainer = trained(model, GPT2, tmp_path, {**EXACT, "train_shared": False})
    stock_trained(plain, GPT2, tmp_path, trainer.args.per_device_train_batch_size, {})
    for name, adapter in adapters_of(plain).items():
        assert not torch.equal(adapter, start[name])
        torch.testing.assert_close(adapters_of(model)[name], adapter, rtol=0, atol=2e-6)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_the_log_has_the_norm_of_all_gradients(limit, tmp_path):
    """Before each block's was clipped by its own."""
    model, norms = made(GPT2, CARRIED), []
    plain = model.to_plain()
    arguments = {"max_steps": 1, "max_grad_norm": limit}
    norms.append(trained(model, GPT2, tmp_path, {**EXACT, **arguments}).state.log_history[0]["grad_norm"])
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, logging_steps=1, use_cpu=True, report_to=[], **arguments)
    stock = Trainer(model=plain, args=args, train_dataset=data(GPT2))
    stock.train()
    norms.append(stock.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class LengthOfMoves(TrainerCallback):
    """How far each step moved some parameters."""

    def __init__(self, parameters):
        self.parameters, self.of_step = list(parameters), []

    def on_step_begin(self, *args, **kwargs):
        self._before = [p.detach().clone() for p in self.parameters]

    def on_step_end(self, *args, **kwargs):
        moves = [(p.detach() - before).norm() for p, before in zip(self.parameters, self._before)]
        self.of_step.append(torch.stack(moves).norm().item())


def test_exact_gradients_are_clipped_by_the_norm_of_all(tmp_path):
    """But in the first step, which does not know those of blocks that are yet to come: what these had in the last one counts.
    One batch, and steps that hardly move, so that these are the same."""
    model, batch = made(GPT2, CARRIED), data(GPT2).select([0] * 8)
    plain = model.to_plain()
    once = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 3, "max_grad_norm": 1e-2}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **once)
    trainers = [trainer_of(model, GPT2, tmp_path, {**EXACT, **once}), Trainer(model=plain, args=args)]
    lengths = [LengthOfMoves(model.backbone.transformer.h.parameters()), LengthOfMoves(plain.transformer.h.parameters())]
    for trainer, length in zip(trainers, lengths):
        trainer.train_dataset = batch
        trainer.add_callback(length)
        trainer.train()
    ours, theirs = (length.of_step for length in lengths)
    assert ours[0] > 1.05 * theirs[0]
    assert ours[1:] == pytest.approx(theirs[1:], rel=1e-3)


def test_blocks_on_their_own_losses_are_clipped_by_their_own_norms(tmp_path):
    model = made(GPT2, CARRIED)
    before = [[p.detach().clone() for p in model.block_parameters(k)] for k in range(B)]
    arguments = {**LOCAL, "max_steps": 1, "optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 1e-3}
    trained(model, GPT2, tmp_path, arguments)
    for k in range(B):
        moves = [after - start for after, start in zip(model.block_parameters(k), before[k])]
        assert torch.stack([move.norm() for move in moves]).norm().item() == pytest.approx(1e-2 * 1e-3, rel=1e-2)


def test_the_log_and_the_card_say_so(objective, tmp_path):
    trainer = trained(made(GPT2, CARRIED), GPT2, tmp_path, {**objective, "max_steps": 1})
    named = {name for name in trainer.state.log_history[0] if name.startswith("loss_block")}
    assert named == {f"loss_block_{k}" for k in (range(B) if objective is LOCAL else [B - 1])}
    trainer.save_model()
    assert "- block schedule: together" in (tmp_path / "README.md").read_text()


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
        args.fp16 = arguments.get("fp16", False)  # (the CPU has none)
        check_schedule(model, args, None)
