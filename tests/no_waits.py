"""What test_device.py runs, in a process of its own, since a made-up kind of device stays: a training step of every model on
tensors that have no memory, and say they are on an accelerator.

    python no_waits.py

Prints, as JSON, what first made each step wait for the accelerator, or draw on the CPU, and where; null where nothing does.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from families import CASES, Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers.utils import import_utils

import hf_diffusionblocks
from hf_diffusionblocks.diffusion.randomness import keyed_generators


class MadeUpBackend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return torch.empty(0)

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        pass


_setup_privateuseone_for_python_backend("madeup", MadeUpBackend())
DEVICE = torch.device("madeup:0")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
OURS = Path(hf_diffusionblocks.__file__).parent


class Waited(Exception):
    """An operation that a step must not have."""


class Generator(torch.Generator):
    """One that says it is on the device it is asked for."""

    def __new__(cls, device: torch.device | str = "cpu"):
        return super().__new__(cls)

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


class Watched(TorchDispatchMode):
    """Raises [`Waited`] where the host asks the accelerator for a value, copies to it or from it, or draws by itself.

    Values and shapes that depend on them are what tensors without memory cannot give: PyTorch raises by itself, then. On the
    CPU all is real.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {each.device.type for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and each.dim()}
        asked = {kwargs["device"].type} if kwargs.get("device") is not None else inputs
        if len(inputs | asked) > 1:
            raise Waited(f"{func}: from {' and '.join(inputs)} to {' and '.join(asked)}")
        on_device = DEVICE.type in inputs | asked
        if torch.Tag.nondeterministic_seeded in func.tags and not on_device:
            raise Waited(f"{func}: drawn on the CPU")
        if not on_device:
            return func(*args, **kwargs)
        with FAKE:
            return func(*args, **kwargs)


def first_wait(step: Callable[[], None]) -> str | None:
    """What it is, and the line of ours that asked for it."""
    try:
        # (Transformers leaves out what it would look up in values, of tensors without memory.)
        with Watched(), mock.patch.object(import_utils, "is_fake_tensor", lambda tensor: False):
            step()
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if OURS in Path(frame.filename).parents]
        where = [f"{Path(frame.filename).relative_to(OURS)}:{frame.lineno} {frame.line}" for frame in frames]
        return " <- ".join([f"{type(error).__name__}: {str(error)[:300]}", *where[::-1]])
    return None


def moved(model: torch.nn.Module) -> torch.nn.Module:
    with FAKE:
        model.to_empty(device=DEVICE)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    with FAKE:
        return {name: torch.empty_like(each, device=DEVICE) for name, each in case.rows().items()}


def step_of(case: Case, **fields) -> Callable[[], None]:
    """Forward and backward pass of each block, with noise as the Trainer gives it."""
    model, batch = moved(case.model(**fields)).train(), batch_of(case)

    def step() -> None:
        for block in case.blocks:
            generator = keyed_generators([0, 0], range(4), DEVICE)
            model(**batch, block_index=block, generator=generator).loss.backward()

    return step


def main() -> None:
    torch.Generator = Generator
    found = {name: first_wait(step_of(case)) for name, case in CASES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
