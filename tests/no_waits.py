"""What test_device.py runs, in a process of its own, since a made-up kind of device stays: a training step of every model on
tensors that have no memory, and say they are on an accelerator.

    python no_waits.py FILE

Writes, as JSON, what first made each step wait for the accelerator, or draw on the CPU, and where; null where nothing does.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from families import CASES, trainer_of
from test_device import STEPS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils import import_utils
from transformers.utils.import_utils import is_fake_tensor

import hf_diffusionblocks
from hf_diffusionblocks.training.checks import trained_parameters


class MadeUpBackend(_DummyBackendModule):
    def manual_seed(self, seed: int) -> None:
        pass

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


def first_wait(step: Callable[[], None], looks: bool = False) -> str | None:
    """What it is, and the line of ours that asked for it.

    Args:
        looks: whether the stock model's forward may look up in values if a mask hides anything, as under its own Trainer.
            (Of tensors without memory Transformers leaves that out.)
    """
    try:
        with Watched(), mock.patch.object(import_utils, "is_fake_tensor", is_fake_tensor if looks else lambda tensor: False):
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


def made_up(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with FAKE:
        return {name: torch.empty_like(each, device=DEVICE) for name, each in batch.items()}


def step_of(name: str, fields: dict, columns: Sequence[str], arguments: dict, folder: str) -> Callable[[], None]:
    """What the Trainer does with a batch that is on the device, for a step of each block, or for one of all together, up to
    the gradients of the last that moves. `columns` of ones are added to the batch."""
    case = CASES[name]
    model, batch = case.model(**fields), case.rows()
    batch |= {column: torch.ones_like(batch["input_ids"]) for column in columns}
    arguments = {"max_steps": len(case.blocks), "measure_memory": False, **arguments}
    trainer = trainer_of(model, case, folder, **arguments)
    moved(model)
    trainer.args.__dict__["_setup_devices"] = DEVICE
    trainer.create_scheduler(trainer.args.max_steps, torch.optim.SGD(model.parameters()))
    trainer.optimizer = torch.optim.SGD(model.parameters())  # (not wrapped by Accelerate, which is no part of ours)
    trainer.current_gradient_accumulation_steps = 1
    batch, state = made_up(batch), made_up({"losses": trainer._block_losses, "items": torch.ones(())})
    trainer._block_losses = state["losses"]

    def step() -> None:
        with trained_parameters(model, trainer.train_blocks, trainer.args.train_shared) as trainer._parameters:
            for trainer.state.global_step in range(1 if trainer._together else len(case.blocks)):
                if not trainer._together:
                    trainer.begin_block(trainer.block_schedule.block_at(trainer.state.global_step))
                trainer.training_step(model, batch, state["items"])
                trainer._clip_grad_norm(model)

    return step


def looked_up_by_transformers() -> None:
    """Whether a mask hides anything."""
    hidden, mask = torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    create_causal_mask(LlamaConfig(attn_implementation="sdpa"), hidden, mask, None)


#: What has to be found.
CONTROLS = {
    "value": lambda: torch.ones(3, device=DEVICE).sum().item(),
    "choice": lambda: bool(torch.ones(3, device=DEVICE).any()),
    "rows of a mask": lambda: torch.ones(3, device=DEVICE).nonzero(),
    "look of Transformers": looked_up_by_transformers,
    "copy to the device": lambda: torch.ones(3).to(DEVICE),
    "numbers to the device": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "copy to the host": lambda: torch.ones(3, device=DEVICE).cpu(),
    "draw on the CPU": lambda: torch.randn(3),
    "draw on the CPU by a row's generator": lambda: torch.rand(3, generator=torch.Generator()),
}


def main() -> None:
    torch.Generator = Generator
    with TemporaryDirectory() as folder:
        found = {name: first_wait(step_of(*step, folder), CASES[step[0]].runs_stock) for name, step in STEPS.items()}
    found |= {name: first_wait(control) for name, control in CONTROLS.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
