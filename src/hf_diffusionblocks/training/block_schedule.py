"""Which block each optimizer step trains, and how fast: a function of seed and step, so the same on all ranks and after a
resume. One optimizer serves all blocks, with parameter groups for each, whose learning rate follows its own updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from ..models.base import DiffusionBlocksPreTrainedModel

ORDERS = ("random", "together")


class BlockSchedule:
    """Block of every step of a run.

    Args:
        order: "random": the blocks take turns, every round of them in a fresh random order, so each step's block is uniformly
            random and all blocks get equally many updates. "together": no turns, every step trains all. Where the run ends
            within a round, some blocks get fewer updates than others.
        blocks: those that are trained, ascending.
        total_steps: optimizer steps of the whole run.
        seed: of the random order.
    """

    def __init__(self, order: str, blocks: Sequence[int], total_steps: int, seed: int):
        self.order, self.blocks, self.total_steps, self.seed = order, tuple(blocks), total_steps, seed
        #: updates of the block that gets most of them
        self.updates_per_block = max(self.updates_before(total_steps, block) for block in self.blocks)

    def block_at(self, step: int) -> int:
        """The block that optimizer step `step` (from 0) trains."""
        index, place = divmod(step, len(self.blocks))
        return _round(self.seed, index, self.blocks)[place]

    def updates_before(self, step: int, block_index: int) -> int:
        """How many of the steps before `step` trained this block."""
        if block_index not in self.blocks:
            return 0
        if self.order == "together":
            return step
        rounds, within = divmod(step, len(self.blocks))
        return rounds + (_round(self.seed, rounds, self.blocks).index(block_index) < within)

    def learning_rate(self, curve: Callable[[int], float], block: int | None, step: int) -> float:
        """Of a group's parameters, over the optimizer's: by the updates of their block; of what is shared (None), which any
        step may move, by how far the run has come."""
        if block is None:
            return curve(step * self.updates_per_block // max(self.total_steps, 1))
        return curve(self.updates_before(step, block))


@lru_cache(maxsize=2)
def _round(seed: int, index: int, blocks: tuple[int, ...]) -> list[int]:
    return np.random.default_rng([seed, index]).permutation(blocks).tolist()


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
    blocks = [group.get("block") for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(schedule.learning_rate, curve, block) for block in blocks])
