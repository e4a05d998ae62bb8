"""What gradients that are never there together are clipped by, and what the log says of them."""

from __future__ import annotations

import pytest
import torch
from process_scenarios import GPT2, made, trainer_of
from together_runs import B, CARRIED, EXACT, LOCAL, data, trained
from transformers import Trainer, TrainerCallback, TrainingArguments


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
