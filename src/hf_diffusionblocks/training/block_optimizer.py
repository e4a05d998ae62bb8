"""One optimizer for all blocks: a parameter group for each, whose learning rate follows the block's own updates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from ..models.base import DiffusionBlocksPreTrainedModel
from .block_schedule import BlockSchedule


def split_by_block(optimizer: torch.optim.Optimizer, model: DiffusionBlocksPreTrainedModel) -> None:
    """Split each parameter group by block, and tag it with its "block" (None: of no block)."""
    owner = {id(p): block.index for block in model.blocks for p in block.parameters()}
    groups = []
    for group in optimizer.param_groups:
        for block in [None, *range(model.num_blocks)]:
            params = [p for p in group["params"] if owner.get(id(p)) == block]
            groups.append({**group, "params": params, "block": block})
    optimizer.param_groups = [group for group in groups if group["params"]]


def learning_rate_curve(args: TrainingArguments, num_updates: int) -> Callable[[int], float]:
    """`lr_scheduler_type`, warm-up included, as a function of the update, from 0.

    Raises:
        ValueError: it is no function of the update alone.
    """
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),  # of which `min_lr` is a part
        num_warmup_steps=args.get_warmup_steps(num_updates),
        num_training_steps=num_updates,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} is not a function of the step: it cannot run on each "
            "block's own update count; 'linear', 'cosine', 'constant_with_warmup' and the like can"
        )
    return scheduler.lr_lambdas[0]


def scheduler_by_block(args: TrainingArguments, optimizer: torch.optim.Optimizer, schedule: BlockSchedule) -> LambdaLR:
    """A scheduler whose groups advance with the updates of their blocks; of what is shared, with the run."""
    curve = learning_rate_curve(args, schedule.updates_per_block)

    def curve_of_block(block: int | None) -> Callable[[int], float]:
        if block is None:  # any step may move it
            return lambda step: curve(step * schedule.updates_per_block // max(schedule.total_steps, 1))
        return lambda step: curve(schedule.updates_before(step, block))

    return LambdaLR(optimizer, [curve_of_block(group.get("block")) for group in optimizer.param_groups])
