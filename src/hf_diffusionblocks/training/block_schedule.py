"""Which block each optimizer step trains: a function of seed and step, so the same on all ranks and after a resume."""

from __future__ import annotations

import math

import numpy as np

ORDERS = ("random", "sequential")


class BlockSchedule:
    """Block of every step of a run.

    Args:
        order: "random": every B steps are a fresh random order of the B blocks, so each step's block is uniformly
            random and all blocks get equally many updates. "sequential": all updates of block 0, then of block 1, ...
            Where B does not divide the steps, some blocks get one update more.
        num_blocks: B.
        total_steps: optimizer steps of the whole run.
        seed: of the random order.
    """

    def __init__(self, order: str, num_blocks: int, total_steps: int, seed: int):
        self.order, self.num_blocks, self.total_steps, self.seed = order, num_blocks, total_steps, seed
        #: updates of the block that gets most of them
        self.updates_per_block = math.ceil(total_steps / num_blocks)

    def _round(self, index: int) -> np.ndarray:
        return np.random.default_rng([self.seed, index]).permutation(self.num_blocks)

    def block_at(self, step: int) -> int:
        """The block that optimizer step `step` (from 0) trains."""
        if self.order == "sequential":
            return step * self.num_blocks // self.total_steps
        return int(self._round(step // self.num_blocks)[step % self.num_blocks])

    def updates_before(self, step: int, block_index: int) -> int:
        """How many of the steps before `step` trained this block."""
        if self.order == "sequential":
            first, end = (math.ceil(k * self.total_steps / self.num_blocks) for k in (block_index, block_index + 1))
            return min(max(step, first), end) - first
        rounds, within = divmod(step, self.num_blocks)
        return rounds + int(block_index in self._round(rounds)[:within])
