"""The masking process: counts, the one rule for the block, and draws."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
import torch
from families import seeded

from hf_diffusionblocks.diffusion.masking import MaskingSchedule, draw_counts, draw_masked
from hf_diffusionblocks.diffusion.randomness import keyed_generators


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_a_block_answers_for_its_counts_and_each_count_has_one_block():
    for num_blocks, tokens in product(range(1, 9), range(1, 50)):
        schedule, left = MaskingSchedule(num_blocks), set(range(1, tokens + 1))
        for k in range(num_blocks):
            least, most = (end.item() for end in schedule.counts(k, numbers(tokens), numbers(tokens)))
            low, high = (Fraction(num_blocks - 1 - k + i, num_blocks) for i in (0, 1))
            own = [m for m in range(1, tokens + 1) if low < Fraction(m, tokens) <= high]
            assert own == list(range(least, most + 1))
            assert all(schedule.block_of(numbers(m), numbers(tokens)) == k for m in own)
            left -= set(own)
        assert not left and schedule.block_of(numbers(0), numbers(tokens)) == num_blocks - 1


@pytest.mark.parametrize("num_blocks, tokens, sizes", [(3, 256, [86, 85, 85]), (4, 2, [1, 0, 1, 0])])
def test_blocks_have_as_many_counts_as_their_range_holds(num_blocks, tokens, sizes):
    found = [MaskingSchedule(num_blocks).counts(k, numbers(tokens), numbers(tokens)) for k in range(num_blocks)]
    assert [max(0, (most - least + 1).item()) for least, most in found] == sizes


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.05, 1.5])
def test_overlap_widens_a_range_by_its_share_of_the_width(overlap):
    for num_blocks, tokens, maskable in product((1, 3, 4), (1, 10, 30, 256), (1, 9, 256)):
        schedule, maskable = MaskingSchedule(num_blocks, overlap), min(maskable, tokens)
        for k in range(num_blocks):
            gamma, low = Fraction(str(overlap)), num_blocks - 1 - k
            least = max(1, math.floor((low - gamma) * tokens / num_blocks) + 1)
            most = min(maskable, math.floor((low + 1 + gamma) * tokens / num_blocks))
            assert schedule.counts(k, numbers(tokens), numbers(maskable), overlap) == (least, most)
    assert schedule.interval(1, overlap) == (max(2 - overlap, 0) / 4, min(3 + overlap, 4) / 4)


def test_counts_are_stratified_over_the_batch_and_follow_from_the_rows_generators():
    least, most = torch.full((24,), 5), torch.full((24,), 10)
    counts = draw_counts(least, most, keyed_generators([0], range(24)))
    assert Counter(counts.tolist()) == dict.fromkeys(range(5, 11), 4)
    assert torch.equal(counts, draw_counts(least, most, keyed_generators([0], range(24))))
    assert not torch.equal(counts, draw_counts(least, most, keyed_generators([1], range(24))))
    alone = torch.cat([draw_counts(least[:1], most[:1], seeded(seed)) for seed in range(600)])
    assert all(abs(count - 100) < 40 for count in Counter(alone.tolist()).values())  # 4 standard deviations
    assert draw_counts(numbers(3, 2), numbers(2, 2), seeded()).tolist() == [0, 2]  # no such number in the first


def test_sets_are_exact_uniform_and_of_maskable_tokens():
    maskable = torch.tensor([True, False, True, True, True]).expand(6000, 5)
    masked = draw_masked(torch.full((6000,), 2), maskable, seeded())
    found = Counter(map(tuple, masked.tolist()))
    assert len(found) == 6 and all(sum(chosen) == 2 and not chosen[1] for chosen in found)
    assert all(abs(count - 1000) < 130 for count in found.values())  # 4.5 standard deviations
    assert not draw_masked(numbers(0), maskable[:1], seeded()).any()
