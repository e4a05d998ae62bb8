"""Runs that train all blocks in each step, and the stock Trainer's beside them."""

from __future__ import annotations

import pytest
import torch
from process_scenarios import DIT, GPT2, VIT, rows, trainer_of
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_diffusionblocks as db

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
    """
    Args:
        dataset: instead of the source's.
    """
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
