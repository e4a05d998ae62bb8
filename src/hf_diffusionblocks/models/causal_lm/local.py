"""Recommended for text: blocks of the plain model, each trained on the cross-entropy of the next token, read out by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...diffusion.likelihood import LikelihoodTerms
from ...diffusion.objectives import IGNORED, chunked_sum, cross_entropy, num_counted, rows_with_loss
from ..block import Block
from ..formulation import Formulation
from .text import ReadoutInput, Text


class LocalText(Formulation):
    """An ordinary causal pass; a block starts from what the blocks before it made of the text. There is no noise: at the
    paper's highest level, where the target is out of sight, this is what its denoiser learns. In use it is the plain model.
    """

    passes_on = runs_stock = True
    walks = False  #: whether a token's logits are the end of a walk

    @staticmethod
    def check_attention(requested: str | None) -> None:
        """Every implementation of attention goes with it."""

    def train(self, block: Block, text: Text, targets: torch.Tensor, noise: Mapping) -> tuple[torch.Tensor, ReadoutInput]:
        """What has left a block, `[N, S, D]`, and what tokens 1 to S-1 are read out from, `[N, S-1, D]`.

        Raises:
            ValueError: `noise` says a level or a draw.
        """
        if given := [name for name in ("sigma", "noise") if noise.get(name) is not None]:
            raise ValueError(f"{given[0]} must be None with preset='recommended': blocks of next tokens have no noise there")
        leaving, read = block.run_stock(text.of_stock_model(), text.block_input)
        return leaving, ReadoutInput(read[:, :-1])

    def logits(self, block: Block, rows: ReadoutInput) -> torch.Tensor:
        """`[R, V]` of p(token | before), float32."""
        return block.head(rows.hidden).float()

    def predict(
        self, text: Text, labels, num_items, return_logits: bool | None, text_walk: None, num_steps: int | None, **stock
    ) -> CausalLMOutputWithPast:
        """What the plain model gives; `stock` as it takes it.

        Raises:
            ValueError: several steps are asked for.
        """
        if num_steps not in (None, 1):
            raise ValueError(
                f"num_steps={num_steps!r} must be 1 or None with preset='recommended': one evaluation says all, and no other "
                "follows"
            )
        if labels is not None and return_logits is False:
            return CausalLMOutputWithPast(loss=self.loss(text.of_stock_model(), labels, num_items))
        stock = self.model.asked_of_stock_model(stock)
        if labels is None and "use_cache" not in stock:
            stock["use_cache"] = None  # as the config says; nobody goes on from a text that is scored
        if num_items is not None:
            stock["num_items_in_batch"] = num_items
        return self.model.backbone(**{**text.of_stock_model(), **stock}, labels=labels)

    def loss(self, inputs: Mapping, labels: torch.Tensor, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
        """The mean cross-entropy of what the stock model takes, without ever holding all logits."""
        rows, targets, last = self._last_hidden(inputs)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), self.model.blocks[-1]
        labelled = rows_with_loss(targets, at_most=len(targets))
        with last.reading_out() as parameters:
            total = chunked_sum(
                lambda rows, targets: cross_entropy(last.head(rows).float(), targets).sum(),
                [rows[labelled], targets[labelled]],
                parameters,
                self.model.config.vocab_size,
            )
        return total / num_counted(targets, num_items, self.model.training)

    def _last_hidden(self, inputs: Mapping) -> torch.Tensor:
        """What the head reads, `[N, S, D]`."""
        return self.model.base(**inputs).last_hidden_state

    def block_logits(self, text: Text) -> torch.Tensor:
        """Every block's, `[N, B, S, V]`."""

        def run(block: Block, entering: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            leaving, read = block.run_stock(text.of_stock_model(), entering)
            return leaving, block.head(read.flatten(0, 1)).unflatten(0, read.shape[:2])

        return torch.stack(self.model.each_block(run), 1)

    def likelihood_terms(self, batch: Mapping[str, torch.Tensor], num_samples: int, generator) -> LikelihoodTerms:
        """The cross-entropy: there is no diffusion to bound."""
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        targets = batch["labels"][:, 1:]
        hidden = self._last_hidden(Text.of(batch).of_stock_model())[:, :-1]
        nats = [  # a sequence at a time, whose logits are there alone
            F.cross_entropy(self.model.blocks[-1].head(row).float(), target, ignore_index=IGNORED, reduction="sum").double()
            for row, target in zip(hidden, targets)
        ]
        nats, tokens = torch.stack(nats).cpu(), (targets != IGNORED).sum(1).double().cpu()
        return LikelihoodTerms(tokens, 0.0, nats, torch.zeros_like(nats))
