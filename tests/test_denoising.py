"""Preconditioning and the walk against closed forms."""

from __future__ import annotations

import torch
from scipy import stats
from torch.nn import functional as F

from hf_diffusionblocks import NoiseSchedule
from hf_diffusionblocks.diffusion.gaussian import edm_loss_weight, precondition
from hf_diffusionblocks.diffusion.randomness import noise_of_positions, noise_of_rows
from hf_diffusionblocks.diffusion.samplers import hard_bridge, soft_bridge, walk

PRIOR = torch.tensor([0.5, 0.3, 0.15, 0.05])


def unit_targets(classes: int = 4, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_preconditioning_gives_unit_variance_in_and_out():
    """EDM's conditions: the network's input and its training target have variance 1 for any sigma."""
    sigma, data = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64), 0.5
    c = precondition(sigma, data)
    assert torch.allclose(c.input**2 * (sigma**2 + data**2), torch.ones_like(sigma))
    target_variance = ((1 - c.skip) ** 2 * data**2 + c.skip**2 * sigma**2) / c.out**2
    assert torch.allclose(target_variance, torch.ones_like(sigma))
    assert torch.allclose(c.noise, sigma.log() / 4)


def test_edm_weight_makes_the_effective_weight_one():
    sigma = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64)
    weight = edm_loss_weight(sigma, 0.5)
    assert weight.shape == sigma.shape
    assert torch.allclose(weight * precondition(sigma, 0.5).out ** 2, torch.ones_like(sigma))


def test_bridges():
    targets, logits = unit_targets(), torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    assert torch.allclose(soft_bridge(logits, targets), logits.softmax(-1) @ targets)
    assert torch.equal(hard_bridge(logits, targets), targets[:1])


def test_euler_walk_follows_the_exact_ode_of_one_target():
    """With one class the ODE's solution is z(s) = e + s/sigma_max (z - e): Euler is exact on it, at any T."""
    target = unit_targets(1)
    noise = noise_of_rows(16, 8, 0, torch.Generator().manual_seed(0), torch.device("cpu"))
    sigmas = NoiseSchedule(3).inference_sigmas(7)
    _, z = walk(lambda z, step: torch.zeros(len(z), 1), target, sigmas, noise, soft_bridge)
    assert torch.allclose(z, target + 0.002 / 80 * (80 * noise - target), atol=1e-5)


def drawn_frequencies(num_steps: int, rows: int = 20_000) -> torch.Tensor:
    """Class frequencies of a walk with the exact denoiser of PRIOR."""
    targets, sigmas = unit_targets(), NoiseSchedule(1).inference_sigmas(num_steps)

    def exact(z, step):
        """Bayes' rule: `p(v | z) ~ p(v) exp(<z, e_v> / sigma^2)` for targets of norm 1."""
        return PRIOR.log() + z @ targets.T / sigmas[step].float() ** 2

    noise = noise_of_rows(rows, targets.shape[1], 0, torch.Generator().manual_seed(num_steps), torch.device("cpu"))
    _, z = walk(exact, targets, sigmas, noise, soft_bridge)
    return torch.cdist(z, targets).argmin(-1).bincount(minlength=4)


def test_a_soft_walk_approaches_the_prior_only_with_many_steps():
    few, many = (drawn_frequencies(steps) / 20_000 for steps in (2, 400))
    assert (many - PRIOR).abs().max() < 0.015
    assert (few - PRIOR).abs().max() > 0.1


def test_keyed_noise_is_equal_for_all_rows_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = (noise_of_rows(3, 8, 7, None, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second) and first.unique(dim=0).shape[0] == 1
    assert torch.equal(torch.get_rng_state(), state)


# ---- noise keyed by position


def drawn(positions, seed: int = 7) -> torch.Tensor:
    return noise_of_positions(torch.as_tensor(positions), 8, seed)


def test_position_noise_is_a_function_of_position_however_positions_are_asked_for():
    """Together, in another order and batch, or one at a time; across the pages they are drawn in."""
    positions = [0, 63, 64, 5, 200, 63, 5]
    together = drawn(positions)
    assert torch.equal(together, torch.cat([drawn([position]) for position in positions]))
    assert torch.equal(together, drawn(positions[::-1]).flip(0))


def test_position_noise_differs_between_seeds():
    assert not torch.equal(drawn([3]), drawn([3], seed=8))


def test_position_noise_is_standard_normal():
    noise = noise_of_positions(torch.arange(4000), 16, 0)
    assert stats.kstest(noise.flatten().double().numpy(), "norm").pvalue > 0.01
    # Neighbours in position are as unrelated as any.
    assert (noise[1:] * noise[:-1]).mean().abs() < 4 / (3999 * 16) ** 0.5


def test_position_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    drawn([999])
    assert torch.equal(torch.get_rng_state(), state)
