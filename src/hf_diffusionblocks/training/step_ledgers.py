"""The Trainer's ledgers: what a step of each block holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..memory.ledger import Ledger, StepMemory

logger = logging.get_logger(__name__)

#: Part of a ledger -> what it is called in a model card.
LABELS = {
    "shared": "parameters and buffers, embeddings and head",
    "blocks": "parameters, layers",
    "adaln": "parameters, AdaLN",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "averages": "averages of weights",
    "activations": "activations saved for backward",
    "logits": "logits",
}
STEPS = 2  #: of each block are followed: in its second, all blocks of the run have optimizer state


class StepLedgers(TrainerCallback):
    """Follows the memory of the first steps of each block.

    Not through compiled layers, which are not followed.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._steps: dict[int, int] = {}
        self._followed: StepMemory | None = None
        self.of_block: dict[int, Ledger] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Of the last forward and backward pass of an optimizer step."""
        trainer, block = self._trainer, self._trainer.active_block
        if self._steps.get(block, 0) >= STEPS or trainer.args.torch_compile:
            yield
            return
        averages = trainer.averages.on_device if trainer.averages else ()
        kept = trainer._together.kept if trainer._together is not None else ()
        with StepMemory(trainer.model, trainer.optimizer, averages, kept) as self._followed:
            yield

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._followed is not None:
            block = self._trainer.active_block
            self.of_block[block] = self._followed.ledger()
            self._steps[block] = self._steps.get(block, 0) + 1
            self._followed = None

    @property
    def largest(self) -> tuple[int, Ledger] | None:
        """The block whose step holds most, and what."""
        return max(self.of_block.items(), key=lambda item: item[1].total, default=None)

    def report(self) -> dict[str, int]:
        """For the model card: each part at its largest, of the largest step."""
        if self.largest is None:
            return {}
        parts = asdict(self.largest[1].parts)
        return {label: parts[part] for part, label in LABELS.items() if parts[part]}

    def log(self) -> None:
        """The table of the largest step."""
        if self.largest is not None:
            block, ledger = self.largest
            logger.info(f"memory of a training step, of block {block}, the largest:\n{ledger}")
