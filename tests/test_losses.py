"""Cross-entropy against PyTorch's own; chunks are tested where models use them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_diffusionblocks.diffusion.objectives import cross_entropy


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e5])
def test_cross_entropy_and_its_gradient_are_pytorchs(scale):
    """Up to logits as far apart as the likelihood at sigma_min makes them."""
    logits = (scale * torch.randn(16, 50, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets = torch.arange(16)
    weights = torch.linspace(0, 2, 16)  # each row has its own
    results = []
    for losses in (cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none")):
        (gradient,) = torch.autograd.grad((weights * losses).sum(), logits)
        results.append((losses, gradient))
    (losses, gradient), (expected_losses, expected_gradient) = results
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(gradient, expected_gradient)


def test_gradients_hold_no_denormal_numbers():
    logits = -torch.arange(0.0, 120.0, 0.5)[None].requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), logits)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])).sum(), logits)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert ((expected != 0) & (expected.abs() < smallest)).any()  # PyTorch's do
    assert not ((gradient != 0) & (gradient.abs() < smallest)).any()
