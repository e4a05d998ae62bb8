"""Steps that train all blocks on their batch, one block after another, each alone with its gradients and activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..diffusion.randomness import seeded
from ..models.active import without_dropout
from .gradient_norms import GradientNorms

if TYPE_CHECKING:
    from .trainer import DiffusionBlocksTrainer


class TogetherSteps:
    """What `block_schedule="together"` makes of an optimizer step: a block runs over all micro-batches and moves, and its
    gradients are dropped before the next one has any; what blocks share moves once, on the sum, when all have moved.

    `objective="local"`, first block to last: each is moved by its own loss, and hands on what it put out before it moved,
    so its layers run once. `objective="exact"`, last to first: the forward pass keeps no more than what enters each block;
    then each runs again, and gets the gradient of the model's loss from the block after it.

    Args:
        trainer: of the model.
    """

    def __init__(self, trainer: DiffusionBlocksTrainer):
        self._trainer, self._model = trainer, trainer.model
        self.exact = trainer.args.objective == "exact"
        #: whether a block starts from what the one before it put out, which is then handed to it here
        self._passes_on = self._model.context.passes_on
        self._gathered: list[tuple[dict, Any]] = []  # micro-batches of the step, and their items, until all are there
        self._entering: list[torch.Tensor | None] = []  # what enters the active block; None: it embeds
        self._leaving: list[torch.Tensor | None] = []  # local: what leaves it
        self._gradients: list[torch.Tensor | None] = []  # exact: of what leaves it (each list has a place a micro-batch)
        self._before: list[list[torch.Tensor | None]] = []  # exact: what enters the blocks before it
        self._norms: list[torch.Tensor] = []  # of the gradients of the blocks that have moved
        if self.exact:
            trainer.add_callback(GradientNorms())

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
            loss = self._last_to_first(batches, items) if self.exact else self._first_to_last(batches, items)
        finally:
            self._entering, self._leaving, self._before, self._gradients = [], [], [], []
        shared = trainer._trained_now()[1]
        if trainer._averages_gradients and shared:
            trainer.layout.average_gradients([], shared)
        return loss

    def forget(self) -> None:
        """What a run that was stopped within a step has gathered."""
        self._gathered = []

    @property
    def kept(self) -> list[torch.Tensor]:
        """Hidden states, and gradients of them, that passes leave for later ones."""
        every = [*self._before, self._entering, self._leaving, self._gradients]
        every.append([hidden.grad for hidden in self._entering if hidden is not None])
        return [tensor for of_block in every for tensor in of_block if tensor is not None]

    def norm(self, shared: float) -> float:
        """Of all gradients of the last step, before they were clipped, from that of those of what blocks share."""
        return math.hypot(*(norm.item() for norm in self._norms), shared)

    # ---- local

    def _first_to_last(self, batches: Sequence[dict], items: Sequence) -> torch.Tensor:
        """The mean of the blocks' losses."""
        trained, losses = self._trainer.train_blocks, []
        run = range(max(trained) + 1) if self._passes_on else trained
        self._entering = [None] * len(batches)
        for k in run:
            self._leaving = [None] * len(batches)
            if k in trained:
                self._trainer.begin_block(k, _following(k, trained))
                losses.append(sum(self._passes(batches, items)))
                self._move()
            else:
                with torch.no_grad(), without_dropout(self._model.backbone):
                    self._leaving = [self._run(k, m, batch) for m, batch in enumerate(batches)]
            self._entering = self._leaving
        return torch.stack(losses).mean()

    # ---- exact

    def _last_to_first(self, batches: Sequence[dict], items: Sequence) -> torch.Tensor:
        """The model's loss."""
        trained, last = self._trainer.train_blocks, self._model.num_blocks - 1
        self._forward(batches, first=min(trained))
        loss = None
        for k in range(last, min(trained) - 1, -1):
            self._trainer.begin_block(k, k - 1 if k > min(trained) else None)
            self._entering = self._before.pop()
            if k > min(trained):  # the block before gets a gradient
                for hidden in self._entering:
                    hidden.requires_grad_()
            if k == last:
                loss = sum(self._passes(batches, items))
            else:
                self._send_back(k, batches)
            self._gradients = [None if hidden is None else hidden.grad for hidden in self._entering]
            if k in trained:
                self._move()
        if self._model.offload is not None:
            self._model.offload.rest()
        return loss

    @torch.no_grad()
    def _forward(self, batches: Sequence[dict], first: int) -> None:
        """Keep what enters each block from `first`."""
        self._entering, self._before = [None] * len(batches), []
        for k in range(self._model.num_blocks):
            if k >= first:
                self._before.append(self._entering)
            if k == self._model.num_blocks - 1:
                return
            if self._model.offload is not None:
                self._model.offload.use(k, following=k + 1)
            self._entering = [self._run(k, m, batch) for m, batch in enumerate(batches)]

    def _send_back(self, k: int, batches: Sequence[dict]) -> None:
        """Run a block again, and the gradients of what left it back through it."""
        for m, batch in enumerate(batches):
            with self._trainer.following_memory(m == len(batches) - 1):
                hidden = self._run(k, m, batch)
                if hidden.requires_grad:  # (the first block may be frozen)
                    hidden.backward(self._gradients[m])
            self._gradients[m] = None

    # ---- one block

    def _passes(self, batches: Sequence[dict], items: Sequence) -> Iterator[torch.Tensor]:
        """Forward and backward passes of the active block; their losses."""
        for m, (batch, num_items) in enumerate(zip(batches, items)):
            yield self._trainer.block_pass(self._model, batch, num_items, is_last=m == len(batches) - 1)

    def output_of(self, m: int, inputs: dict) -> torch.Tensor | None:
        """What has left the active block in the pass that goes on, over a micro-batch; None if `forward` runs it."""
        if not self._passes_on:
            return None
        hidden = self._run(self._trainer.active_block, m, inputs)
        if not self.exact:
            self._leaving[m] = hidden.detach()
        return hidden

    def _run(self, k: int, m: int, inputs: dict) -> torch.Tensor:
        block, x, hidden = self._model.blocks[k], self._model.clean_input(inputs), self._entering[m]
        # (Accelerate casts in `forward`, of which this is no part.)
        with self._trainer.accelerator.autocast(), self._same_dropout(k, m) if self.exact else nullcontext():
            hidden = block.embed(x.inputs) if hidden is None else hidden
            return block.run_clean(hidden, **x.attention)

    def _same_dropout(self, k: int, m: int) -> AbstractContextManager[None]:
        """In both runs of a block over a micro-batch: keyed by seed, step, both, and the rank."""
        args, step = self._trainer.args, self._trainer.state.global_step
        return seeded([args.seed, step, k, m, args.process_index], args.device)

    def _move(self) -> None:
        """An optimizer step of the active block alone."""
        trainer = self._trainer
        own, shared = trainer._trained_now()
        with without_gradients(shared):
            if trainer._averages_gradients and own:
                trainer.layout.average_gradients(own, [])
            self._norms.append(self._clip(own))
            trainer.optimizer.step()
            trainer.control = trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
            for parameter in own:
                parameter.grad = None

    def _clip(self, own: list[nn.Parameter]) -> torch.Tensor:
        """Clip the gradients of the active block; their norm before."""
        trainer, limit = self._trainer, self._trainer.args.max_grad_norm
        if self.exact:
            return self._gradient_norms.clip(str(trainer.active_block), own, limit)
        return trainer.accelerator.clip_grad_norm_(own, limit or math.inf)

    def clip_shared(self) -> torch.Tensor:
        """Exact: clip the gradients of what blocks share; their norm before."""
        return self._gradient_norms.clip("shared", self._trainer._trained_now()[1], self._trainer.args.max_grad_norm)

    @property
    def _gradient_norms(self) -> GradientNorms:
        # (A resumed run may have put another in the place of that which was added.)
        return next(each for each in self._trainer.callback_handler.callbacks if isinstance(each, GradientNorms))


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set their gradients aside: an optimizer leaves them as they are, then."""
    aside = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in aside:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in aside:
            parameter.grad = gradient


def _following(block: int, trained: Sequence[int]) -> int | None:
    """The block that trains after another, in this step or the next; None if there is no other."""
    later = next((k for k in trained if k > block), trained[0])
    return later if later != block else None
