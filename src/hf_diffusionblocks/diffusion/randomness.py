"""Random numbers of a batch: from one generator, or from one a row, so that a row's do not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

#: None is the global generator.
Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(kind: Callable[..., torch.Tensor], shape: Sequence[int], generator: Generators, **kwargs) -> torch.Tensor:
    """`kind` (`torch.rand` or `torch.randn`) of `[N, ...]`, on the generators' device (CPU for None).

    Raises:
        ValueError: there are several generators, and not N.
    """
    if generator is None:
        return kind(shape, **kwargs)
    if isinstance(generator, torch.Generator):
        return kind(shape, generator=generator, device=generator.device, **kwargs)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators must be {shape[0]}, one a row, or one for all")
    return torch.stack([kind(tuple(shape[1:]), generator=own, device=own.device, **kwargs) for own in generator])


def keyed_generators(key: Sequence[int], rows: Sequence[int]) -> list[torch.Generator]:
    """A generator for each row, a function of the key and the row's number alone."""
    seeds = (np.random.SeedSequence([*key, row]).generate_state(1, np.uint64)[0] for row in rows)
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
