"""Steps that train all blocks on their batch, one block after another, each alone with its gradients and activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from ..optimizers import without_gradients
from .parallel import average_gradients

if TYPE_CHECKING:
    from .trainer import DiffusionBlocksTrainer


class TogetherSteps:
    """What `block_schedule="together"` makes of an optimizer step: a block runs over all micro-batches and moves, and its
    gradients are dropped before the next one has any; what blocks share moves once, on the sum, when all have moved.

    First block to last: each is moved by its own loss, and hands on what it put out before it moved, so its layers run once.

    Args:
        trainer: of the model.
    """

    def __init__(self, trainer: DiffusionBlocksTrainer):
        self._trainer, self._model = trainer, trainer.model
        #: whether a block starts from what the one before it put out, which is then handed to it here
        self._passes_on = self._model.formulation.passes_on
        self._gathered: list[tuple[dict, Any]] = []  # micro-batches of the step, and their items, until all are there
        self._entering: list[Any] = []  # what enters the active block; None: it embeds
        self._leaving: list[Any] = []  # what leaves it (each list has a place a micro-batch)
        self._norms: list[torch.Tensor] = []  # of the gradients of the blocks that have moved

    def training_step(self, inputs: dict, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """Take note of a micro-batch; of the last one, train all blocks. Returns the step's loss then, and 0 before."""
        trainer = self._trainer
        self._gathered.append((trainer._prepare_inputs(inputs), num_items))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        # (Of data without a length, what is left of an epoch is part of the next step, over the items that it was told.)
        batches, items = zip(*self._gathered)
        self._gathered, self._norms = [], []
        self._model.train()
        try:
            loss = self._first_to_last(batches, items)
        finally:
            self._entering, self._leaving = [], []
        if trainer.args.world_size > 1:
            average_gradients(trainer._parameters[None])
        return loss

    def forget(self) -> None:
        """What a run that was stopped within a step has gathered."""
        self._gathered = []

    @property
    def kept(self) -> list[torch.Tensor]:
        """Hidden states that passes leave for later ones."""
        return [each for each in tree_leaves((self._entering, self._leaving)) if isinstance(each, torch.Tensor)]

    def norm(self, shared: float) -> float:
        """Of all gradients of the last step, before they were clipped, from that of those of what blocks share."""
        return math.hypot(*(norm.item() for norm in self._norms), shared)

    # ---- from block to block

    def _first_to_last(self, batches: Sequence[dict], items: Sequence) -> torch.Tensor:
        """The mean of the blocks' losses."""
        trained, losses = self._trainer.train_blocks, []
        self._entering = [None] * len(batches)
        for k in range(max(trained) + 1) if self._passes_on else trained:
            self._leaving = [None] * len(batches)
            if k in trained:
                self._trainer.begin_block(k)
                losses.append(sum(self._passes(batches, items)))
                self._move()
            else:
                self._leaving = [self._passed_on(k, m, batch) for m, batch in enumerate(batches)]
            if self._passes_on:
                self._entering = self._leaving
        return torch.stack(losses).mean()

    def _passed_on(self, k: int, m: int, batch: dict) -> Any:
        """What leaves a block that does not train."""
        with self._trainer.accelerator.autocast():  # (Accelerate casts in `forward`, of which this is no part)
            return self._model.passed_on(self._model.blocks[k], batch, self._entering[m])

    def entering(self, m: int) -> dict[str, Any]:
        """What `forward` is told of a micro-batch, beside the batch, for the pass that comes."""
        return {} if self._entering[m] is None else {"block_input": self._entering[m]}

    def note(self, m: int, outputs: Any) -> None:
        """Keep what `forward` says has left the active block."""
        if self._passes_on:
            (self._leaving[m],) = outputs.hidden_states

    # ---- one block

    def _passes(self, batches: Sequence[dict], items: Sequence) -> Iterator[torch.Tensor]:
        """Forward and backward passes of the active block; their losses."""
        for m, (batch, num_items) in enumerate(zip(batches, items)):
            yield self._trainer.block_pass(self._model, batch, num_items, is_last=m == len(batches) - 1)

    def _move(self) -> None:
        """An optimizer step of the active block alone."""
        trainer = self._trainer
        own, shared = trainer._parameters[trainer.active_block], trainer._parameters[None]
        with without_gradients(shared):
            if trainer.args.world_size > 1:
                average_gradients(own)
            limit = trainer.args.max_grad_norm
            self._norms.append(trainer.accelerator.clip_grad_norm_(own, limit if limit and limit > 0 else math.inf))
            callbacks = trainer.callback_handler
            trainer.control = callbacks.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
            trainer.optimizer.step()
            trainer.control = callbacks.on_optimizer_step(trainer.args, trainer.state, trainer.control)
            for parameter in own:
                parameter.grad = None
