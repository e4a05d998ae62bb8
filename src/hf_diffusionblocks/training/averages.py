"""Exponential moving averages (EMA) of the weights that a run trains."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from ..streaming import stream_of
from .run_report import RunReports

FILE = "averages.safetensors"  #: of a checkpoint


def decay_after(updates: int, ema_decay: float) -> float:
    """What an average keeps of itself at a parameter's n-th update, from 1: little at first, so that it soon forgets where
    training began."""
    return min(ema_decay, (1 + updates) / (10 + updates))


class WeightAverages(TrainerCallback):
    """Keeps a float32 average of every parameter that a run trains, and puts all of them into the model on request.

    An average moves when its parameter does: a block's in the block's own steps, a shared one's in the steps that reach
    it. The warm-up of the decay counts these updates, too.

    Args:
        trainer: whose model.
    """

    def __init__(self, trainer: AveragingTrainer):
        self._trainer = trainer
        self._parameters: dict[str, nn.Parameter] = {}  # by their names in the model, as all that follows
        self._averages: dict[str, torch.Tensor] = {}
        self.updates: dict[str, int] = {}  #: how often each was updated
        self._are_in_model = False

    def follow(self, trained: Collection[nn.Parameter]) -> None:
        """Begin a run that trains these parameters; its averages start from the weights that it starts from."""
        known = {id(parameter) for parameter in trained}
        named = self._trainer.model.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if id(parameter) in known}
        self._averages, self.updates = {}, {}

    @property
    def on_device(self) -> list[torch.Tensor]:
        """Those that take the device's memory: each is where its parameter is."""
        stream = stream_of(self._trainer.model)
        away = set() if stream is None else set(stream.host_parameters)
        return [average for name, average in self._averages.items() if self._parameters[name] not in away]

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._averages:  # nor were they loaded
            self._place({name: parameter.detach() for name, parameter in self._parameters.items()})
            self.updates = dict.fromkeys(self._parameters, 0)

    def _place(self, values: Mapping[str, torch.Tensor]) -> None:
        self._averages = {
            name: torch.empty(value.shape, dtype=torch.float32, device=self._parameters[name].device).copy_(value)
            for name, value in values.items()
        }

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self._parameters.items():
            if parameter.grad is None:  # the optimizer leaves it as it is
                continue
            self.updates[name] += 1
            average = self._averages[name]
            weight = 1 - decay_after(self.updates[name], self._trainer.args.ema_decay)
            average.lerp_(parameter.to(average.dtype), weight)

    # ---- in the model

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Have the model hold the averages; afterwards its own weights, which wait in host memory, are back bit for bit.
        Inside another such context, and before training: nothing changes."""
        if self._are_in_model:
            yield
            return
        own: dict[str, torch.Tensor] = {}
        self._are_in_model = True
        try:
            own = {name: self._parameters[name].detach().to("cpu", copy=True) for name in self._averages}
            self._write(self._averages)
            yield
        finally:
            self._write(own)
            self._are_in_model = False

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)  # (not its `data`: a stream goes by the version)

    # ---- in a checkpoint

    def save(self, folder: str | PathLike) -> None:
        """Write averages and counts of updates to a checkpoint."""
        save_file(self._averages, Path(folder) / FILE, metadata={"updates": json.dumps(self.updates)})

    def load(self, folder: str | PathLike) -> None:
        """Go on with the averages of a checkpoint.

        Raises:
            ValueError: it has none, or not those of the parameters that this run trains.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, and ema_decay={self._trainer.args.ema_decay}: the checkpoint is of a run without "
                "averages. Resume with ema_decay=None, or start a new run from its weights"
            )
        with safe_open(path, framework="pt") as file:
            loaded = {name: file.get_tensor(name) for name in file.keys()}
            updates = json.loads(file.metadata()["updates"])
        shapes, expected = ({(name, *tensor.shape) for name, tensor in each.items()} for each in (loaded, self._parameters))
        if shapes != expected:
            name, *shape = min(shapes ^ expected)
            has = "lacks" if (name, *shape) in expected else "has"
            raise ValueError(f"{path} is not of the parameters that this run trains: it {has} {name} of shape {shape}")
        self._place(loaded)
        self.updates = updates


class AveragingTrainer(RunReports):
    """The part of the Trainer that evaluates and saves averages of the weights, if it is asked to keep some."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.averages = WeightAverages(self) if self.args.ema_decay is not None else None
        if self.averages:
            self.add_callback(self.averages)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Have the model hold the averages of its weights (`ema_decay`), and then its own again, bit for bit.

        `evaluate`, `predict` and `save_model` do so themselves; draw samples inside. Without `ema_decay`, and before
        training, nothing changes.
        """
        return self.averages.in_model() if self.averages else nullcontext()

    def train(self, *args, **kwargs):
        if self.averages:
            self.averages.follow([p for part in self._parameters.values() for p in part if p.requires_grad])
        return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self.averaged_weights():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """As the Trainer's, with averages for weights; a checkpoint has the weights, and the averages beside them."""
        with nullcontext() if self.writes_checkpoint else self.averaged_weights():
            super().save_model(output_dir, *args, **kwargs)
        if self.averages and self.writes_checkpoint and self.args.should_save:
            self.averages.save(output_dir)
