"""Which block each optimizer step trains: a function of seed and step, so the same on all ranks and after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ORDERS = ("random", "sequential")


class BlockSchedule:
    """Block of every step of a run.

    Args:
        order: "random": every round of steps is a fresh random order of the blocks, so each step's block is uniformly
            random and all blocks get equally many updates. "sequential": all updates of the first block, then of the
            next. Where the number of blocks does not divide the steps, some get one update more.
        blocks: those that are trained, ascending.
        total_steps: optimizer steps of the whole run.
        seed: of the random order.
    """

    def __init__(self, order: str, blocks: Sequence[int], total_steps: int, seed: int):
        self.order, self.blocks, self.total_steps, self.seed = order, list(blocks), total_steps, seed
        #: updates of the block that gets most of them
        self.updates_per_block = math.ceil(total_steps / len(blocks))

    def _round(self, index: int) -> list[int]:
        return np.random.default_rng([self.seed, index]).permutation(self.blocks).tolist()

    def block_at(self, step: int) -> int:
        """The block that optimizer step `step` (from 0) trains."""
        if self.order == "sequential":
            return self.blocks[step * len(self.blocks) // self.total_steps]
        return self._round(step // len(self.blocks))[step % len(self.blocks)]

    def updates_before(self, step: int, block_index: int) -> int:
        """How many of the steps before `step` trained this block."""
        if block_index not in self.blocks:
            return 0
        if self.order == "sequential":
            place = self.blocks.index(block_index)
            first, end = (math.ceil(k * self.total_steps / len(self.blocks)) for k in (place, place + 1))
            return min(max(step, first), end) - first
        rounds, within = divmod(step, len(self.blocks))
        return rounds + (block_index in self._round(rounds)[:within])
