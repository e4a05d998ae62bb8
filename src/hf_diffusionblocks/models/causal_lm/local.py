"""Recommended for text: blocks of the plain model, each trained on the cross-entropy of the next token, read out by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...backbones.stock_run import base_of
from ...diffusion.likelihood import LikelihoodTerms
from ...diffusion.objectives import IGNORED
from ..block import Block
from ..formulation import Formulation


class LocalText(Formulation):
    """An ordinary causal pass; a block starts from what the blocks before it made of the text. There is no noise: at the
    paper's highest level, where the target is out of sight, this is what its denoiser learns. In use it is the plain model.
    """

    passes_on = runs_stock = True
    walks = False  #: whether a token's logits are the end of a walk

    @staticmethod
    def check_attention(requested: str | None) -> None:
        """Every implementation of attention goes with it."""

    def train(
        self, block: Block, x: Mapping, targets: torch.Tensor, block_input: torch.Tensor | None, noise: Mapping
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What has left a block, `[N, S, D]`, and what tokens 1 to S-1 are read out from, `[N, S-1, D]`.

        Raises:
            ValueError: `noise` says a level or a draw.
        """
        for name in ("sigma", "noise"):
            if noise.get(name) is not None:
                raise ValueError(f"{name} must be None with preset='recommended': blocks of next tokens have no noise there")
        leaving, read = block.run_stock(x, block_input)
        return leaving, (read[:, :-1],)

    def logits(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, V]` of p(token | before), float32."""
        return block.head(hidden).float()

    def predict(
        self, x: Mapping, labels, num_items, return_logits: bool | None, text_walk: None, num_steps: int | None, **stock
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
            return CausalLMOutputWithPast(loss=self.loss(x, labels, num_items))
        stock = self.model.asked_of_stock_model(stock)
        if labels is None and "use_cache" not in stock:
            stock["use_cache"] = None  # as the config says; nobody goes on from a text that is scored
        if num_items is not None:
            stock["num_items_in_batch"] = num_items
        return self.model.backbone(**{**x, **stock}, labels=labels)

    def loss(self, inputs: Mapping, labels: torch.Tensor, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
        """The mean cross-entropy of what the stock model takes, without ever holding all logits."""
        return self.model.mean_loss(self.model.blocks[-1], [self._last_hidden(inputs)[:, :-1]], labels[:, 1:], num_items)

    def _last_hidden(self, inputs: Mapping) -> torch.Tensor:
        """What the head reads, `[N, S, D]`."""
        return base_of(self.model.backbone, self.model.layers_path)(**inputs).last_hidden_state

    def block_logits(self, x: Mapping) -> torch.Tensor:
        """Every block's, `[N, B, S, V]`."""

        def run(block: Block, entering: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            leaving, read = block.run_stock(x, entering)
            return leaving, block.head(read.flatten(0, 1)).unflatten(0, read.shape[:2])

        return torch.stack(self.model.each_block(run), 1)

    def likelihood_terms(self, batch: Mapping[str, torch.Tensor], num_samples: int, generator) -> LikelihoodTerms:
        """The cross-entropy: there is no diffusion to bound."""
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        targets = batch["labels"][:, 1:]
        hidden = self._last_hidden(self.model.stock_inputs(batch))[:, :-1]
        nats = [  # a sequence at a time, whose logits are there alone
            F.cross_entropy(self.model.blocks[-1].head(row).float(), target, ignore_index=IGNORED, reduction="sum").double()
            for row, target in zip(hidden, targets)
        ]
        nats, tokens = torch.stack(nats).cpu(), (targets != IGNORED).sum(1).double().cpu()
        return LikelihoodTerms(tokens, 0.0, nats, torch.zeros_like(nats))
