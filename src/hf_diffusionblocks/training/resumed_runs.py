"""A run that is resumed goes on as it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from .arguments import DiffusionBlocksTrainingArguments


class StepsOfRun(TrainerCallback, ExportableState):
    """What decides which blocks a step trains, and on what; kept in a checkpoint's `trainer_state.json`.

    A run that is resumed with other values is refused: the steps that it counts on were other steps.
    """

    def __init__(self, **values):
        self._values = values

    @classmethod
    def of(cls, args: DiffusionBlocksTrainingArguments, blocks: Sequence[int]) -> StepsOfRun:
        """Of settled arguments, and the blocks that are trained."""
        names = ("block_schedule", "train_shared", "seed")
        return cls(**{name: getattr(args, name) for name in names}, train_blocks=list(blocks))

    def state(self) -> dict:
        return {"args": self._values, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._compare(state)

    def check(self, checkpoint: Path) -> None:
        """Compare with the run that has written a checkpoint.

        Raises:
            ValueError: names the argument that differs, and both values.
        """
        file = checkpoint / TRAINER_STATE_NAME
        if file.is_file():  # (otherwise the Trainer says what is missing)
            self._compare(TrainerState.load_from_json(str(file)))

    def _compare(self, state: TrainerState) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not (saved and state.global_step):  # a run of its own, or one resumed from a checkpoint without
            return
        for name, before in saved["args"].items():
            if self._values.get(name, before) != before:
                raise ValueError(
                    f"{name}={self._values[name]!r} must be {before!r}, as in the run that is resumed from step "
                    f"{state.global_step}; or load that checkpoint as a model, and start anew"
                )
