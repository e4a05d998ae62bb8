"""Which block each optimizer step trains: a function of seed and step, so the same on all ranks and after a resume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
        self.order, self.blocks, self.total_steps, self.seed = order, list(blocks), total_steps, seed
        #: updates of the block that gets most of them
        self.updates_per_block = max(self.updates_before(total_steps, block) for block in self.blocks)

    def _round(self, index: int) -> list[int]:
        return np.random.default_rng([self.seed, index]).permutation(self.blocks).tolist()

    def block_at(self, step: int) -> int:
        """The block that optimizer step `step` (from 0) trains."""
        index, place = divmod(step, len(self.blocks))
        return self._round(index)[place]

    def updates_before(self, step: int, block_index: int) -> int:
        """How many of the steps before `step` trained this block."""
        if block_index not in self.blocks:
            return 0
        if self.order == "together":
            return step
        rounds, within = divmod(step, len(self.blocks))
        return rounds + (self._round(rounds).index(block_index) < within)
