"""What a model of images is measured by, without anything that has to be downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_diffusionblocks.diffusion.gaussian import corrupt, edm_loss_weight
from hf_diffusionblocks.diffusion.schedule import NoiseSchedule

NUM_FEATURES = 64


class Classifier(nn.Module):
    """A small convolutional network; its last hidden layer is the feature space of distances between sets of images."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 7 * 7, NUM_FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def trained_classifier(data: dict, file: Path) -> Classifier:
    """Trained once, then read from `file`. Data: split -> (images `[N, 1, 28, 28]`, labels `[N]`)."""
    torch.manual_seed(0)
    model = Classifier()
    if file.is_file():
        model.load_state_dict(torch.load(file))
        return model.eval()
    images, labels = data["train"]
    epochs, batch = 3, 128
    optimizer = torch.optim.AdamW(model.parameters())
    total = epochs * (len(images) // batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            scheduler.step()
    torch.save(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def in_batches(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(batch) for batch in images.split(500)])


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between Gaussians fitted to two sets of features `[N, D]`: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    means = one.mean(0) - other.mean(0)
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    # tr (C C')^(1/2) by eigenvalues: a feature that is never active makes C singular, and matrix roots inaccurate.
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    return float(means @ means + np.trace(covariances[0] + covariances[1]) - 2 * trace)


def precision_and_recall(made: np.ndarray, real: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Shares of samples that lie within the other set's manifold (arXiv 1904.06991): a ball around each sample, as large as
    the distance to its k-th neighbour."""

    def covered(samples: torch.Tensor, manifold: torch.Tensor) -> float:
        radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values  # (the nearest is itself)
        return (torch.cdist(samples, manifold) <= radii).any(1).float().mean().item()

    made, real = (torch.tensor(features, dtype=torch.float64) for features in (made, real))
    return covered(made, real), covered(real, made)


def held_out_losses(
    denoise: Callable[..., torch.Tensor], images: torch.Tensor, labels: torch.Tensor, sigma_data: float
) -> list[float]:
    """EDM's weighted loss by quarter of the noise distribution, lowest first."""
    return held_out_errors(denoise, images, labels, sigma_data).mean(1).tolist()


@torch.no_grad()
def held_out_errors(
    denoise: Callable[..., torch.Tensor], images: torch.Tensor, labels: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """The same of each image, `[4, N]`: the same levels and noise for every model."""
    quarters = NoiseSchedule(num_blocks=4)
    errors = []
    for block in (3, 2, 1, 0):
        parts = []
        for number, (y, own) in enumerate(zip(images.split(250), labels.split(250))):
            generator = torch.Generator().manual_seed(1000 * block + number)
            sigma = quarters.stratified(block, len(y), generator).float()
            z = corrupt(y.flatten(1), sigma, generator=generator).view_as(y)
            error = (denoise(z, sigma, own) - y).square().mean((1, 2, 3))
            parts.append(edm_loss_weight(sigma, sigma_data) * error)
        errors.append(torch.cat(parts))
    return torch.stack(errors)
