"""Training: which block moves when, schedules on each block's own count, resume, logs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from conftest import NUM_LABELS
from transformers import TrainerCallback, TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks.training import BlockSchedule
from hf_diffusionblocks.training.block_schedule import learning_rate_curve


class Images(torch.utils.data.Dataset):
    """64 random images, made as they are asked for."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": index % NUM_LABELS}


def make_trainer(model, folder, callbacks=None, **arguments) -> db.DiffusionBlocksTrainer:
    arguments = {
        "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 8, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    args = db.DiffusionBlocksTrainingArguments(output_dir=str(folder), **arguments)
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=Images(), eval_dataset=Images(), callbacks=callbacks)


class StepRecorder(TrainerCallback):
    """Notes the active block and the learning rates of each optimizer step."""

    def __init__(self):
        self.trainer, self.blocks, self.rates = None, [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append({group["block"]: group["lr"] for group in self.trainer.optimizer.param_groups})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.blocks.append(self.trainer.active_block)


def train_and_record(model, folder, **arguments) -> StepRecorder:
    recorder = StepRecorder()
    recorder.trainer = make_trainer(model, folder, callbacks=[recorder], **arguments)
    recorder.trainer.train()
    return recorder


# ---- which block


@pytest.mark.parametrize("num_blocks, total_steps", [(1, 5), (3, 12), (4, 10), (4, 5)])
def test_schedule_counts_the_updates_of_each_block(num_blocks, total_steps):
    schedule = BlockSchedule("random", range(num_blocks), total_steps, 0)
    counts = Counter()
    for step in range(total_steps):
        assert [schedule.updates_before(step, k) for k in range(num_blocks)] == [counts[k] for k in range(num_blocks)]
        counts[schedule.block_at(step)] += 1
    updates = [counts[k] for k in range(num_blocks)]
    assert max(updates) == schedule.updates_per_block
    assert max(updates) - min(updates) == (total_steps % num_blocks > 0)


@pytest.mark.parametrize(
    "arguments, others, message",
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1 must be 0"),
        ({}, {"compute_loss_func": lambda *_: 0}, "compute_loss_func must be None"),
        ({}, {"model_init": lambda: None}, "model_init must be None"),
        ({"optim": "galore_adamw_layerwise"}, {}, "optim='galore_adamw_layerwise' must not be layer-wise"),
        ({"optim": "adalomo"}, {}, "optim='adalomo' must not be LOMO's"),
        ({"optim": "schedule_free_radam"}, {}, "optim='schedule_free_radam' must not be schedule-free"),
    ],
)
def test_what_is_of_whole_models_is_refused(arguments, others, message, plain_model, tmp_path):
    args = db.DiffusionBlocksTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **arguments)
    with pytest.raises(ValueError, match=message):
        db.DiffusionBlocksTrainer(model=db.convert(plain_model, 2, preset="paper"), args=args, **others)


def test_random_schedule_is_uniform_and_keyed_by_the_seed():
    drawn = Counter(BlockSchedule("random", range(4), 4, seed).block_at(1) for seed in range(4000))
    assert all(abs(drawn[k] - 1000) < 4 * math.sqrt(1000) for k in range(4))
    runs = [[BlockSchedule("random", range(4), 40, seed).block_at(step) for step in range(40)] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_micro_batches_of_a_step_train_one_block(plain_model, tmp_path):
    model = db.convert(plain_model, num_blocks=2, preset="paper")
    trained = []
    model.register_forward_pre_hook(lambda m, args, kwargs: trained.append(kwargs["block_index"]), with_kwargs=True)
    trainer = make_trainer(model, tmp_path, max_steps=4, gradient_accumulation_steps=2)
    trainer.train()
    assert trained == [trainer.block_schedule.block_at(step) for step in range(4) for _ in range(2)]


def test_updates_per_block_sets_the_number_of_steps(plain_model, tmp_path):
    recorder = train_and_record(db.convert(plain_model, num_blocks=4, preset="paper"), tmp_path, updates_per_block=3)
    assert Counter(recorder.blocks) == dict.fromkeys(range(4), 3)
    assert recorder.trainer.state.global_step == 12


# ---- learning rates


def test_learning_rate_runs_on_each_block_s_own_updates(plain_model, tmp_path):
    """Each block sees the whole curve, warm-up to zero, as a plain model of as many updates would."""
    recorder = train_and_record(
        db.convert(plain_model, num_blocks=2, preset="paper"), tmp_path, updates_per_block=6,
        lr_scheduler_type="linear", warmup_steps=2,
    )  # fmt: skip
    expected = [0, 0.005, 0.01, 0.0075, 0.005, 0.0025]
    for block in range(2):
        rates = [rate[block] for active, rate in zip(recorder.blocks, recorder.rates) if active == block]
        assert rates == pytest.approx(expected)
    shared = [rate[None] for rate in recorder.rates]
    assert shared == pytest.approx([rate for rate in expected for _ in range(2)])


def test_logged_learning_rate_is_the_active_block_s(plain_model, tmp_path):
    recorder = train_and_record(db.convert(plain_model, num_blocks=2, preset="paper"), tmp_path, updates_per_block=2)
    logged = [entry["learning_rate"] for entry in recorder.trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.01, 0.01, 0.005, 0.005])  # each block's first and second update


def test_a_schedule_that_is_no_function_of_the_step_is_refused(plain_model, tmp_path):
    """Before any training."""
    arguments = {"max_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    with pytest.raises(ValueError, match="lr_scheduler_type='reduce_lr_on_plateau' is not a function of the step"):
        make_trainer(db.convert(plain_model, 2, preset="paper"), tmp_path, **arguments)


# ---- logs, evaluation


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_logs_hold_a_loss_for_each_block(micro_batches, plain_model, tmp_path):
    arguments = {"updates_per_block": 2, "logging_steps": 2, "gradient_accumulation_steps": micro_batches}
    trainer = make_trainer(db.convert(plain_model, 2, preset="paper"), tmp_path, **arguments)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:  # one step of each block between logs
        assert (entry["loss_block_0"] + entry["loss_block_1"]) / 2 == pytest.approx(entry["loss"], abs=1e-4)


# ---- resume


def test_best_model_is_loaded_at_the_end(plain_model, tmp_path):
    trainer = make_trainer(
        db.convert(plain_model, 2, preset="paper"), tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-5)


# ---- bad input


def test_resume_from_a_damaged_checkpoint_names_the_shard(plain_model, tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(db.convert(plain_model, 2, preset="paper"), tmp_path, **arguments).train()
    (tmp_path / "checkpoint-2" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(OSError, match="checkpoint-2/model-00002-of-00003.safetensors is missing"):
        make_trainer(db.convert(plain_model, 2, preset="paper"), tmp_path, **arguments).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_plain_model_or_plain_arguments_are_refused(plain_model, tmp_path):
    args = db.DiffusionBlocksTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(TypeError, match="model=ViTForImageClassification must be a DiffusionBlocks model"):
        db.DiffusionBlocksTrainer(model=plain_model, args=args)
    with pytest.raises(TypeError, match="args=TrainingArguments must be DiffusionBlocksTrainingArguments"):
        db.DiffusionBlocksTrainer(
            model=db.convert(plain_model, 2, preset="paper"), args=TrainingArguments(output_dir=str(tmp_path))
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block_schedule": "round-robin"}, "block_schedule='round-robin' must be one of None, 'random', 'together'"),
        ({"updates_per_block": 0}, r"updates_per_block=0 must be a whole number from 1, or None"),
        ({"updates_per_block": 1.5}, r"updates_per_block=1.5 must be a whole number from 1, or None"),
        *(({"ema_decay": decay}, f"ema_decay={decay!r} must be above 0 and below 1") for decay in ("0.9", 0.0, 1.0)),
        ({"updates_per_block": 3, "max_steps": 6}, r"updates_per_block=3 and max_steps=6 both"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        db.DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize(("name", "least"), [("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end")])
def test_a_least_learning_rate_is_a_rate(tmp_path, name, least):
    args = db.DiffusionBlocksTrainingArguments(
        str(tmp_path), learning_rate=1e-3, lr_scheduler_type=name, lr_scheduler_kwargs={least: 1e-4}
    )
    assert args.learning_rate * learning_rate_curve(args, 10)(10) == pytest.approx(1e-4)


def test_several_devices_in_one_process_are_refused(plain_model, tmp_path):
    args = db.DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args._n_gpu = 2  # what the arguments find on a machine with two GPUs, without a launcher
    with pytest.raises(ValueError, match="2 devices in one process cannot .* `accelerate launch`"):
        db.DiffusionBlocksTrainer(model=db.convert(plain_model, 2, preset="paper"), args=args)
