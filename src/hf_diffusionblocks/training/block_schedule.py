"""Which block each optimizer step trains: a function of seed and step, so the same on all ranks and after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ORDERS = ("random", "sequential", "together")


class BlockSchedule:
    """Block of every step of a run.

    Args:
        order: "random": the blocks take turns of `switch_interval` steps, every round of turns in a fresh random order, so
            each step's block is uniformly random and all blocks get equally many updates. "sequential": all updates of the
            first block, then of the next. "together": no turns, every step trains all. Where the run ends within a round,
            some blocks get fewer updates than others.
        blocks: those that are trained, ascending.
        total_steps: optimizer steps of the whole run.
        seed: of the random order.
        switch_interval: steps of a turn.
    """

    def __init__(self, order: str, blocks: Sequence[int], total_steps: int, seed: int, switch_interval: int = 1):
        self.order, self.blocks, self.total_steps, self.seed = order, list(blocks), total_steps, seed
        self.switch_interval = switch_interval
        #: updates of the block that gets most of them
        self.updates_per_block = max(self.updates_before(total_steps, block) for block in self.blocks)

    def _round(self, index: int) -> list[int]:
        return np.random.default_rng([self.seed, index]).permutation(self.blocks).tolist()

    def block_at(self, step: int) -> int:
        """The block that optimizer step `step` (from 0) trains."""
        if self.order == "sequential":
            return self.blocks[step * len(self.blocks) // self.total_steps]
        index, place = divmod(step // self.switch_interval, len(self.blocks))
        return self._round(index)[place]

    def updates_before(self, step: int, block_index: int) -> int:
        """How many of the steps before `step` trained this block."""
        if block_index not in self.blocks:
            return 0
        if self.order == "together":
            return step
        if self.order == "sequential":
            place = self.blocks.index(block_index)
            first, end = (math.ceil(k * self.total_steps / len(self.blocks)) for k in (place, place + 1))
            return min(max(step, first), end) - first
        rounds, within = divmod(step, len(self.blocks) * self.switch_interval)
        turn = self._round(rounds).index(block_index) * self.switch_interval
        return rounds * self.switch_interval + min(max(within - turn, 0), self.switch_interval)
