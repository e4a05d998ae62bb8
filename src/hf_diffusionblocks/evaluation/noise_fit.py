"""Information-uniform noise: as many training draws at each noise level as the level has something to learn."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

from ..models.active import without_dropout
from ..models.base import DiffusionBlocksPreTrainedModel

#: Share of the draws spread evenly over ln sigma, so that every level is trained and none is forgotten.
EVEN_SHARE = 0.05


@torch.no_grad()
def fit_noise_schedule(
    model: DiffusionBlocksPreTrainedModel,
    dataloader: Iterable[dict],
    num_levels: int = 32,
    max_batches: int = 8,
    seed: int = 0,
) -> torch.Tensor:
    """Fit the noise distribution to where the model's cross-entropy rises with sigma, and freeze it into the config.

    A draw at a level where the target is plain to see, or where nothing of it is left, teaches nothing. With mass in
    proportion to the rise of CE(sigma), every block learns the same amount of information. Fit before training: with
    the posterior readout a fresh model already shows where its targets blur.

    Args:
        model: from [`convert`]. Its `config` and `noise_schedule` change; it is left in the mode it was in.
        dataloader: batches as for training, labels included.
        num_levels: noise levels measured, evenly in ln sigma.
        max_batches: batches used.
        seed: of the noise.

    Returns:
        `[num_levels, 2]`: sigma, and the mean cross-entropy in nats with the target inside z.

    Raises:
        TypeError: the model's task leaves no choice of noise_distribution: it has no cross-entropy that rises with sigma.
        ValueError: there are no batches, or the cross-entropy does not rise with sigma (a fresh `readout="edm"`, which
            has yet to learn to read z).
    """
    config, schedule = model.config, model.noise_schedule
    if "noise_distribution" in model.fixed_fields:
        raise TypeError(
            f"model={type(model).__name__} must be of a task with noise to fit: noise_distribution is always "
            f"{model.fixed_fields['noise_distribution']!r} for task {model.task!r}"
        )
    batches = [
        {name: value.to(model.device) for name, value in batch.items()} for batch in islice(dataloader, max_batches)
    ]
    if not batches:
        raise ValueError("dataloader has no batches: there is nothing to fit the noise to")
    ends = torch.tensor([config.sigma_min, config.sigma_max], dtype=torch.float64).log()
    levels = torch.linspace(*ends.tolist(), num_levels, dtype=torch.float64).exp()
    levels[0], levels[-1] = config.sigma_min, config.sigma_max
    with without_dropout(model):
        losses = [_loss_at(model, batches, level, int(schedule.block_of(level)), seed) for level in levels.tolist()]

    curve = torch.tensor(losses, dtype=torch.float64).cummax(0).values
    rise = curve[-1] - curve[0]
    if rise < 0.1:
        raise ValueError(
            f"the cross-entropy rises by {rise:.3g} nats from sigma_min to sigma_max: a model with "
            f"readout={config.readout!r} that has not learned to read z cannot show where its targets blur"
        )
    even = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    shares = (1 - EVEN_SHARE) * (curve - curve[0]) / rise + EVEN_SHARE * even
    shares[-1] = 1.0
    config.noise_distribution = "information"
    config.noise_table = torch.stack([levels, shares], 1).tolist()
    model.noise_schedule = model.schedule_for(config)
    return torch.stack([levels, torch.tensor(losses, dtype=torch.float64)], 1)


def _loss_at(model: DiffusionBlocksPreTrainedModel, batches: list[dict], level: float, block: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)  # the same noise at every level: a smoother curve
    losses = [
        model(**batch, block_index=block, sigma=torch.full((len(batch["labels"]),), level), generator=generator).loss
        for batch in batches
    ]
    return torch.stack(losses).double().mean().item()
