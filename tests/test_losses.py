"""Cross-entropy against PyTorch's own, and gradients that chunks add up; models' chunks are tested where they use them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_diffusionblocks.diffusion import objectives
from hf_diffusionblocks.diffusion.objectives import IGNORED, chunked_cross_entropy


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Summed, of logits as they are."""
    return chunked_cross_entropy(lambda rows: rows, [logits], targets, [], logits.shape[-1], weights)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e5])
def test_cross_entropy_and_its_gradient_are_pytorchs(scale):
    """Up to logits as far apart as the likelihood at sigma_min makes them."""
    logits = (scale * torch.randn(16, 50, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets = torch.arange(16)
    weights = torch.linspace(0, 2, 16)  # each row has its own
    results = []
    plain = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
    for loss in (cross_entropy(logits, targets, weights), plain):
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(logits, targets, weights), plain)


class OnDevice(torch.Tensor):
    """A tensor that says it is on another device."""

    device = torch.device("cuda")

    def __new__(cls, tensor: torch.Tensor):
        return tensor.as_subclass(cls)


def test_gradients_hold_no_denormal_numbers():
    logits = -torch.arange(0.0, 120.0, 0.5)[None].requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), logits)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])), logits)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert ((expected != 0) & (expected.abs() < smallest)).any()  # PyTorch's do
    assert not ((gradient != 0) & (gradient.abs() < smallest)).any()


def test_a_row_without_target_has_neither_loss_nor_gradient():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([3, IGNORED, 0, IGNORED])
    loss = cross_entropy(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits[::2], targets[::2], reduction="sum"))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all(1).tolist() == [False, True, False, True]


def test_rows_are_filled_up_with_those_without_a_loss_where_they_cannot_be_counted():
    """As on an accelerator, which would have to be waited for."""
    targets = torch.tensor([5, IGNORED, 7, IGNORED, 2])
    counted = objectives.rows_with_loss(targets, at_most=4)
    elsewhere = objectives.rows_with_loss(OnDevice(targets), at_most=4)
    assert counted.tolist() == [0, 2, 4] and elsewhere.tolist() == [0, 2, 4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_many_chunks_lose_nothing_of_what_is_small_beside_their_sum(dtype, monkeypatch):
    """Of a head in its own precision, and all rows alike: each of 1024 chunks adds what is below half a step of bfloat16."""
    monkeypatch.setattr(objectives, "rows_per_chunk", lambda num_rows, num_logits, device: 1)
    head = torch.nn.Linear(8, 16, bias=False).to(dtype)
    hidden = torch.ones(1024, 8, dtype=dtype).requires_grad_()

    def gradient(rows: int) -> torch.Tensor:
        loss = chunked_cross_entropy(head, [hidden[:rows]], torch.zeros(rows, dtype=torch.long), [head.weight], 16)
        return torch.autograd.grad(loss, head.weight)[0]

    found, of_one = gradient(1024), gradient(1)
    torch.testing.assert_close(found.float(), 1024 * of_one.float(), rtol=0.01, atol=0.0)
    assert found.dtype == dtype
