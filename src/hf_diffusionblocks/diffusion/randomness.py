"""Random numbers: of a training batch, a row's the same in whatever batch it is; and of a walk, keyed or drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

#: None is the global generator, of the device that draws.
Generators = torch.Generator | Sequence[torch.Generator] | None


def drawing_device(device: torch.device | str) -> torch.device:
    """Where to draw what a device needs: there, or, if it has no float64, on the CPU."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def draw(
    kind: Callable[..., torch.Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor:
    """`kind` (`torch.rand` or `torch.randn`) of `[N, ...]`, where the generators are; without any, on `device`.

    Raises:
        TypeError, ValueError: of [`check_generators`].
    """
    if generator is None:
        return kind(shape, device=drawing_device(device), **kwargs)
    check_generators(generator, shape[0])
    if isinstance(generator, torch.Generator):
        return kind(shape, generator=generator, device=generator.device, **kwargs)
    return torch.stack([kind(tuple(shape[1:]), generator=own, device=own.device, **kwargs) for own in generator])


def check_generators(generator: Generators, num_rows: int) -> None:
    """Of N rows.

    Raises:
        TypeError: there is something else than generators.
        ValueError: there are several generators, and not N.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    for own in generator if isinstance(generator, (list, tuple)) else [None]:
        if not isinstance(own, torch.Generator):
            raise TypeError(f"generator={generator!r} must be a torch.Generator, or a list of them, one a row")
    if len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators must be {num_rows}, one a row, or one for all")


def keyed_generators(key: Sequence[int], rows: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A generator for each row, a function of the key and the row's number alone. Kinds of devices draw other numbers from
    it: what is to be the same on all of them is drawn on the CPU."""
    device, made = drawing_device(device), []
    for row in rows:
        seed = np.random.SeedSequence([*key, row]).generate_state(1, np.uint64)[0]
        made.append(torch.Generator(device).manual_seed(int(seed)))
    return made


@contextmanager
def seeded(key: Sequence[int], device: torch.device) -> Iterator[None]:
    """PyTorch's global generators, of the CPU and of a device, start from a key, and afterwards go on as if nothing had been
    drawn."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    others = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cpu"):
        torch.default_generator.manual_seed(seed)  # (`torch.manual_seed` seeds all devices there are)
        for other in others:
            torch.get_device_module(other).manual_seed(seed)
        yield


def noise_of_rows(num_rows: int, width: int, seed: int, generator: Generators, device: torch.device) -> torch.Tensor:
    """Standard normal `[N, D]` for a walk: of the generators, each row its own.

    Without one the noise is *keyed*: a function of the seed alone, equal for every row, so that a row's prediction does not
    depend on what it is batched with, and repeats exactly.
    """
    rows = 1 if generator is None else num_rows
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    values = draw(torch.randn, (rows, width), generator, dtype=torch.float32)
    return values.to(device).expand(num_rows, width)


PAGE = 64  # positions whose noise is drawn together


@lru_cache(maxsize=256)
def _page_of_noise(seed: int, page: int, width: int) -> torch.Tensor:
    key = np.random.SeedSequence([seed, 0, page]).generate_state(1, np.uint64)[0]
    return torch.randn((PAGE, width), generator=torch.Generator().manual_seed(int(key)))


def noise_of_positions(positions: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Standard normal `[N, D]`, keyed by seed and token position `[N]`, the same for every row of a batch: cached and uncached
    generation, and prompts padded to any length, meet the same."""
    numbers = positions.tolist()
    pages = {page: _page_of_noise(seed, page, width) for page in {number // PAGE for number in numbers}}
    return torch.stack([pages[number // PAGE][number % PAGE] for number in numbers]).to(positions.device)


def invert_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The class at `uniform [N, 1]` of the CDF of softmax(logits `[N, V]`); `[N]`."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = (uniform.double() * cumulative[:, -1:]).contiguous()
    return torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
