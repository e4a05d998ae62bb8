"""Ways to train blocks that benchmarks try, and the package does not offer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import hf_diffusionblocks as db


class KeepsInput(db.DiffusionBlocksTrainer):
    """Adds to a block's loss (blocks together) what it takes to tell the input tokens from what it passes on, by the embeddings,
    which do not move for it: a block is not to throw away what it does not need itself."""

    WEIGHT = 0.1

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training or self.active_block == self.num_blocks - 1:
            return loss
        hidden, tokens = model.left_last, inputs["input_ids"]
        embeddings = model.get_input_embeddings().weight.detach()
        logits = F.rms_norm(hidden, hidden.shape[-1:]) @ F.rms_norm(embeddings, embeddings.shape[-1:]).T
        return loss + self.WEIGHT * F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def remember_what_is_passed_on(model: db.DiffusionBlocksForCausalLM) -> None:
    """Have `model.left_last` be what has left the block that ran last, `[N, S, D]`; for [`KeepsInput`]."""

    def remembering(run):
        def run_and_remember(hidden: torch.Tensor, **attention) -> torch.Tensor:
            model.left_last = run(hidden, **attention)
            return model.left_last

        return run_and_remember

    for block in model.blocks:
        block.run = remembering(block.run)


def pass_input_beside(model: db.DiffusionBlocksForCausalLM) -> None:
    """Add the embedded input to what enters each block after the first, without a gradient."""
    embed = model.blocks[0].embed

    def embedding(inputs) -> torch.Tensor:
        embedded = embed(inputs)
        model.embedded = embedded.detach()
        return embedded

    def adding(run):
        return lambda hidden, **attention: run(hidden + model.embedded, **attention)

    model.blocks[0].embed = embedding
    for block in model.blocks[1:]:
        block.run = adding(block.run)
