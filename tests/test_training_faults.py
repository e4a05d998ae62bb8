"""What users do to a run besides calling it: frozen layers, optimizers, callbacks, checkpoints and losses of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from families import CASES, grid, moved, trainer_of
from process_scenarios import GPT2, VIT
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

import hf_diffusionblocks as db

SCHEDULES = ("random", "together")
TEXT, IMAGES = CASES["gpt2, recommended"], CASES["vit, recommended"]


# ---- what is frozen


def test_what_is_frozen_in_the_source_is_frozen():
    """Also in parts that blocks have of their own."""
    plain = AutoModelForCausalLM.from_config(GPT2)
    for part in (plain.transformer.h[0], plain.transformer.wte):
        part.requires_grad_(False)
    for shared in ("common", "per_block"):
        model = db.convert(plain, 2, preset="paper", shared=shared)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert all("transformer.h.0." in name or "wte" in name or "lm_head" in name for name in frozen)
        layer = {f"backbone.transformer.h.0.{name}" for name, _ in plain.transformer.h[0].named_parameters()}
        assert layer < frozen and any("wte" in name for name in frozen)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_frozen_within_a_run_stay_frozen(schedule, tmp_path):
    """Of a block that is not at its turn, too; and thawed ones train again."""
    model = TEXT.model()
    layers = model.backbone.transformer.h

    class Freezes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                layers.requires_grad_(False)
                self.frozen = copy.deepcopy(layers.state_dict())
            if state.global_step == 4:
                self.kept = all(map(torch.equal, layers.state_dict().values(), self.frozen.values()))
                layers.requires_grad_(True)

    callback = Freezes()
    trainer_of(model, TEXT, tmp_path, [callback], max_steps=8, block_schedule=schedule).train()
    assert callback.kept and not any(map(torch.equal, layers[0].parameters(), callback.frozen.values()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_of_frozen_blocks_is_refused(tmp_path):
    model = TEXT.model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of train_blocks=\[0, 1\] asks for gradients: all are frozen"):
        trainer_of(model, TEXT, tmp_path).train()


class Thaws(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.requires_grad_(True)


class KeepsFromMoving(TrainerCallback):
    """By gradients of zero."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_callbacks_that_change_gradients_change_those_of_every_block(schedule, tmp_path):
    model = TEXT.model()
    before = copy.deepcopy(dict(model.named_parameters()))
    arguments = {"updates_per_block": 1, "optim": "sgd", "block_schedule": schedule}
    trainer = trainer_of(model, TEXT, tmp_path, [KeepsFromMoving()], **arguments)
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert not moved(model, before)


class OwnSchedule(db.DiffusionBlocksTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        return self.lr_scheduler


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_optimizer_and_its_schedule_may_be_made_by_overrides(schedule, tmp_path):
    plain, own = IMAGES.model(), IMAGES.model()
    image_trainer(db.DiffusionBlocksTrainer, plain, tmp_path, schedule).train()
    image_trainer(OwnSchedule, own, tmp_path, schedule).train()
    assert all(map(torch.equal, plain.parameters(), own.parameters()))


@pytest.mark.parametrize("schedule, steps", [("random", {3}), ("together", {4})])
def test_a_block_thawed_within_a_run_moves_in_its_own_steps(schedule, steps, tmp_path):
    """By an optimizer that holds it: one of one's own."""
    model = TEXT.model(shared="per_block")
    block = model.block_parameters(0)
    for parameter in block:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = trainer_of(
        model, TEXT, tmp_path, [Thaws()], max_steps=6 if schedule == "together" else 8, block_schedule=schedule
    )
    trainer.optimizer = optimizer
    trainer.train()
    assert {int(optimizer.state[parameter]["step"]) for parameter in block} == steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(**grid(lambda case: case.trained and len(case.blocks) > 1))
def test_a_frozen_block_stays_as_it_is_and_the_others_train(case, schedule, tmp_path):
    """Its readout is frozen, too: its turn has a loss, and moves nothing."""
    model = case.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.block_of_parameter(name) == case.last_block)
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = trainer_of(model, case, tmp_path, updates_per_block=1, block_schedule=schedule, logging_steps=1)
    trainer.train()
    assert {model.block_of_parameter(name) for name in moved(model, before)} == {case.last_block}
    assert {f"loss_block_{k}" for k in case.blocks} <= set().union(*trainer.state.log_history)


# ---- optimizers


def trainer_with(optimizer, model, folder) -> db.DiffusionBlocksTrainer:
    args = db.DiffusionBlocksTrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=TEXT.dataset(), optimizers=(optimizer, None))


def test_an_optimizer_of_the_plain_model_is_refused(tmp_path):
    plain = AutoModelForCausalLM.from_config(GPT2)
    optimizer = torch.optim.AdamW(plain.parameters())
    with pytest.raises(ValueError, match=r"optimizers=\(AdamW, ...\) holds no parameter of the model"):
        trainer_with(optimizer, db.convert(plain, 2), tmp_path)


def test_an_optimizer_that_counts_steps_for_all_parameters_is_refused(tmp_path):
    """As ScheduleFree and Prodigy do, by the names of their groups' counters."""
    model = db.convert(GPT2, 2)
    for counter in ("k", "d"):
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.param_groups[0][counter] = 0
        with pytest.raises(ValueError, match=f"optimizer=AdamW must count steps by parameter, .* keeps '{counter}'"):
            trainer_with(optimizer, model, tmp_path)


class StepsOfGroup(torch.optim.SGD):
    """Counts in its groups, as fused optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


class StepsOfItself(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize("kind", [StepsOfGroup, StepsOfItself])
def test_what_counts_steps_by_any_name_is_refused(kind, tmp_path):
    """Before a step is taken: what gradients there are move nothing."""
    model = db.convert(GPT2, 2)
    before = copy.deepcopy(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=f"optimizer={kind.__name__} must count steps by parameter, .* keeps 'step"):
        trainer_with(kind(model.parameters(), lr=1.0), model, tmp_path)
    args = db.DiffusionBlocksTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = db.DiffusionBlocksTrainer(model, args, train_dataset=TEXT.dataset(), optimizer_cls_and_kwargs=(kind, {"lr": 1.0}))
    with pytest.raises(ValueError, match=f"optimizer={kind.__name__} must count steps by parameter"):
        trainer.train()
    assert not moved(model, before)


@pytest.mark.parametrize("name", ["dit", "bert, own", "vit, paper-own"])
def test_noise_on_embeddings_that_would_miss_some_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="neftune_noise_alpha=5.0 must be None for .* with shared="):
        trainer_of(CASES[name].model(), CASES[name], tmp_path, neftune_noise_alpha=5.0)


# ---- another model


def test_a_streamed_model_is_not_converted():
    plain = AutoModelForCausalLM.from_config(GPT2)
    with db.stream_layers(plain, device="cpu"), pytest.raises(ValueError, match=r"is streamed: call stop\(\) of its stream"):
        db.convert(plain, 2)
    db.convert(plain, 2)


OTHERS = {
    "the plain one": None, "another preset": {"preset": "paper", "local_head_layers": None},
    "with local heads": {"local_head_layers": 1}, "with own ends": {"shared": "per_block"},
}  # fmt: skip


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_model_is_not_resumed(fields, tmp_path):
    """Not even one without an optimizer, which would not fit: what is not loaded would train on as it is."""
    saves = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 2}
    if fields is None:
        args = TrainingArguments(str(tmp_path), **saves, use_cpu=True, report_to=[], disable_tqdm=True)
        Trainer(TEXT.plain(), args, train_dataset=TEXT.dataset()).train()
    else:
        trainer_of(TEXT.model(**fields), TEXT, tmp_path, **saves, block_schedule="random").train()
    trainer = trainer_of(TEXT.model(), TEXT, tmp_path, max_steps=4, block_schedule="random")
    with pytest.raises(ValueError, match="the checkpoint is of another model: it (lacks|has) "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- losses of one's own

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])


class ClassWeights(db.DiffusionBlocksTrainer):
    """The supported way: a loss made of what the block's own pass gives."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class Penalty(db.DiffusionBlocksTrainer):
    """On all parameters."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + sum(parameter.square().sum() for parameter in model.parameters())
        return (loss, outputs) if return_outputs else loss


class WholeModel(db.DiffusionBlocksTrainer):
    """Another one: of the whole model's logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels)


def image_trainer(trainer_class, model, folder, schedule: str) -> db.DiffusionBlocksTrainer:
    args = db.DiffusionBlocksTrainingArguments(
        str(folder), updates_per_block=1, per_device_train_batch_size=16, learning_rate=1e-2, optim="sgd", use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", block_schedule=schedule, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return trainer_class(model=model, args=args, train_dataset=IMAGES.dataset())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_block_trains_on_a_loss_made_of_its_own_logits(schedule, tmp_path):
    """One block is the plain model: its step is that of the weighted loss."""
    plain = AutoModelForImageClassification.from_config(VIT)
    model = db.convert(plain, 1)
    image_trainer(ClassWeights, model, tmp_path, schedule).train()
    rows = IMAGES.dataset().with_format("torch")[:]
    F.cross_entropy(plain.train()(rows["pixel_values"]).logits, rows["labels"], weight=WEIGHTS).backward()
    for trained, start in zip(model.backbone.parameters(), plain.parameters()):
        torch.testing.assert_close(trained, start - 1e-2 * start.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_penalty_on_all_parameters_moves_a_block_in_its_own_step(schedule, tmp_path):
    """Once, that is: what it asks of other blocks waits for theirs."""
    models = [IMAGES.model(shared="per_block") for _ in range(2)]
    start = copy.deepcopy(dict(models[0].named_parameters()))
    for model, trainer_class in zip(models, (db.DiffusionBlocksTrainer, Penalty)):
        trainer = image_trainer(trainer_class, model, tmp_path, schedule)
        trainer.args.max_steps = 1
        trainer.train()
    stepped = {0, 1} if schedule == "together" else {trainer.active_block}
    for (name, without), parameter in zip(models[0].named_parameters(), models[1].parameters()):
        expected = without - 1e-2 * 2 * start[name] if models[0].block_of_parameter(name) in stepped else start[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loss_of_the_whole_model_is_refused_in_a_block_s_step(schedule, tmp_path):
    with pytest.raises(ValueError, match="block_index=None in a training step of block .* call super"):
        image_trainer(WholeModel, IMAGES.model(), tmp_path, schedule).train()


@pytest.mark.parametrize("sigma", [torch.tensor([0.3, 81.0]), torch.tensor([0.0, 0.3]), torch.tensor([0.3])], ids=str)
def test_noise_levels_outside_of_the_range_or_of_another_shape_are_refused(sigma):
    model = db.convert(GPT2, 2, preset="paper")
    ids = torch.ones(2, 8, dtype=torch.long)
    model(ids, labels=ids, block_index=0, sigma=torch.tensor([0.3, 80.0]))
    with pytest.raises(ValueError, match=r"sigma of shape .* must be of shape \(2,\), sigma_min=0.002 to sigma_max=80"):
        model(ids, labels=ids, block_index=0, sigma=sigma)
