"""What the steps of a Trainer's run hold, of a stock Trainer's, too."""

from __future__ import annotations

import copy

import torch
from transformers import Trainer

import hf_diffusionblocks as db


def ledgers_of(trainer: Trainer) -> list[db.Ledger]:
    """Of each block's step; of a plain model's, by a step of a copy (the ledger is that of a step that is taken)."""
    if isinstance(trainer, db.DiffusionBlocksTrainer):
        return list(trainer.ledgers.values())
    model, rows = copy.deepcopy(trainer.model).train(), trainer.train_dataset
    batch = torch.utils.data.default_collate([rows[k] for k in range(trainer.args.train_batch_size)])
    loss = lambda: trainer.compute_loss(model, dict(batch))  # noqa: E731
    return [db.measure_memory(model, torch.optim.AdamW(model.parameters(), fused=True), loss)]
