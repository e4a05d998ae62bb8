"""The noise schedule: exact properties of the partition, of samples and of the inference grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hf_diffusionblocks import NoiseSchedule

BLOCKS = range(1, 13)


def truncated_cdf(sigma, schedule):
    """Independent reference: SciPy's truncated normal in ln sigma."""
    low, high = ((math.log(s) - schedule.p_mean) / schedule.p_std for s in (0.002, 80.0))
    return stats.truncnorm.cdf(np.log(np.asarray(sigma)), low, high, schedule.p_mean, schedule.p_std)


@pytest.mark.parametrize("num_blocks", BLOCKS)
@pytest.mark.parametrize("p_mean", [-1.2, 0.5])
def test_blocks_have_equal_mass(num_blocks, p_mean):
    schedule = NoiseSchedule(num_blocks, p_mean=p_mean)
    mass = torch.from_numpy(truncated_cdf(schedule.boundaries, schedule)).diff()
    assert (mass - 1 / num_blocks).abs().max() < 1e-9


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_outer_boundaries_are_exact(num_blocks):
    boundaries = NoiseSchedule(num_blocks).boundaries
    assert boundaries.dtype == torch.float64
    assert (boundaries[0].item(), boundaries[-1].item()) == (0.002, 80.0)


def test_boundaries_are_those_of_the_paper_formula():
    """exp(P_mean + P_std Phi^-1(q_min + i/B (q_max - q_min))), by SciPy."""
    q_min, q_max = (stats.norm.cdf((math.log(s) + 1.2) / 1.2) for s in (0.002, 80.0))
    expected = [math.exp(-1.2 + 1.2 * stats.norm.ppf(q_min + i / 3 * (q_max - q_min))) for i in range(4)]
    assert NoiseSchedule(3).boundaries.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_block_of_its_own_samples(num_blocks):
    schedule = NoiseSchedule(num_blocks)
    for k in range(num_blocks):
        sigma = schedule.sample(k, (2000,), torch.Generator().manual_seed(k))
        assert (schedule.block_of(sigma) == k).all()


def test_block_zero_is_the_highest_noise():
    schedule = NoiseSchedule(4)
    assert schedule.block_of(80.0) == 0
    assert schedule.block_of(0.002) == 3
    # Intervals are closed above: a boundary belongs to the block below it.
    assert schedule.block_of(schedule.boundaries).tolist() == [3, 3, 2, 1, 0]


def test_overlap_widens_in_log_sigma_and_is_clipped():
    schedule = NoiseSchedule(3, overlap=0.05)
    low, high = schedule.interval(1)
    widening = (high / low) ** 0.05
    assert schedule.interval(1, schedule.overlap) == pytest.approx((low / widening, high * widening), rel=1e-12)
    assert schedule.interval(0, 0.05)[1] == 80.0 and schedule.interval(2, 0.05)[0] == 0.002


@pytest.mark.parametrize("block_index", range(3))
@pytest.mark.parametrize("overlap", [0.0, 0.1])
def test_samples_follow_the_truncated_log_normal(block_index, overlap):
    schedule = NoiseSchedule(3, overlap=overlap)
    sigma = schedule.sample(block_index, (20_000,), torch.Generator().manual_seed(0))
    low, high = schedule.interval(block_index, overlap)
    assert low < sigma.min() and sigma.max() <= high
    cdf_low, cdf_high = truncated_cdf([low, high], schedule)
    result = stats.kstest(sigma.numpy(), lambda s: (truncated_cdf(s, schedule) - cdf_low) / (cdf_high - cdf_low))
    assert result.pvalue > 0.01


@pytest.mark.parametrize("num_blocks", BLOCKS)
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_inference_levels_meet_the_boundaries_bit_for_bit(num_blocks, factor):
    schedule = NoiseSchedule(num_blocks)
    sigmas = schedule.inference_sigmas(factor * num_blocks)
    assert sigmas.shape == (factor * num_blocks + 1,)
    assert torch.equal(sigmas[::factor], schedule.boundaries.flip(0))


def test_cdf_inverts_quantile():
    schedule = NoiseSchedule(3)
    fractions = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(schedule.cdf(schedule.quantile(fractions)), fractions, atol=1e-9)


@pytest.mark.parametrize("call", [lambda s: s.interval(3), lambda s: s.sample(-1, (2,))])
def test_unknown_block_is_named(call):
    with pytest.raises(ValueError, match=r"block_index=(3|-1) must lie in 0\.\.2"):
        call(NoiseSchedule(3))
