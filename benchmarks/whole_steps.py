"""The Trainer's steps that train all blocks together, as the step-cost benchmarks time those of one block."""

from __future__ import annotations

import tempfile
import time

import torch
from transformers import TrainerCallback

import hf_diffusionblocks as db


class Clock(TrainerCallback):
    """CPU seconds of each step, from its forward pass to the optimizer's last move."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self._start = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.process_time() - self._start)


class WholeSteps:
    """A model that is trained on one batch, again and again; all blocks in every step."""

    def __init__(self, model, batch: dict[str, torch.Tensor]):
        self.model = model
        self.rows = [dict(zip(batch, row)) for row in zip(*batch.values())]

    def _run(self, steps: int, clock: Clock) -> db.DiffusionBlocksTrainer:
        with tempfile.TemporaryDirectory() as folder:
            args = db.DiffusionBlocksTrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=len(self.rows), block_schedule="together",
                max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no",
                logging_strategy="no", disable_tqdm=True, measure_memory=steps < 3, dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = db.DiffusionBlocksTrainer(model=self.model, args=args, train_dataset=self.rows, callbacks=[clock])
            trainer.train()
        return trainer

    def seconds(self) -> list[float]:
        """Of a step: the fastest of a few."""
        clock = Clock()
        self._run(3, clock)
        return [min(clock.seconds)]

    def bytes(self) -> tuple[int, int]:
        """Stored activations, what is kept between passes included, and gradients, both at their largest."""
        parts = [ledger.parts for ledger in self._run(2, Clock()).ledgers.values()]
        return max(part.activations for part in parts), max(part.gradients for part in parts)
