"""Targets that are one of V known vectors: Bayes' rule for them, and how logits become a point among them.

Pure functions of tensors. `N` is the batch, `V` the number of classes (or tokens), `D` the width of the target embeddings.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def posterior_logits(
    prior_logits: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Bayes' rule for a categorical target: `p(v | x, z) ∝ p(v | x) exp((<z, e_v> - ||e_v||^2 / 2) / sigma^2)`.

    The likelihood is that of `z = e_v + sigma noise`, without what does not depend on v. At sigma_min it reaches 1e5, so
    it is computed in float32, outside autocast. (A matrix product: the distances themselves would cost V x D operations
    a row that no fast kernel does.)

    Args:
        prior_logits: the network's `f(x, ...)`, `[N, V]`.
        z: noisy targets `[N, D]`.
        sigma: noise levels `[N]`; at infinity z says nothing, and the prior is returned.
        targets: the known vectors e_v, `[V, D]`.

    Returns:
        `[N, V]` float32: the network has only the prior left to learn, whatever the noise level.
    """
    with torch.autocast(z.device.type, enabled=False):
        precision, targets = sigma.float() ** -2, targets.float()
        half_norms = torch.linalg.vector_norm(targets, dim=-1) ** 2 / 2
        # Added where the product is made, and in place: with a large vocabulary every pass over logits counts.
        logits = torch.addmm(prior_logits.float(), z.float() * precision[:, None], targets.T)
        return logits.addr_(precision, half_norms, alpha=-1)


def soft_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The expected target under softmax(logits), `[N, D]`: the posterior mean. Shrinks where the model is unsure."""
    return logits.float().softmax(-1) @ targets.float()


def hard_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The most likely target, `[N, D]`."""
    return F.embedding(logits.argmax(-1), targets).float()


BRIDGES = {"soft": soft_bridge, "hard": hard_bridge}
