"""Autoregressive text: x is the tokens before, y the L2-normalised embedding of the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...backbones.stock_run import base_of
from ...configuration import DiffusionBlocksConfig
from ...diffusion.objectives import IGNORED, LikelihoodTerms, chunked_cross_entropy, num_counted
from ...diffusion.randomness import Generators
from ...streaming import weights_on_device
from ..base import DiffusionBlocksPreTrainedModel, Formulation
from ..block import Block
from ..positions import positions_of
from ..targets import FixedTargets
from .generation import WalkGeneration
from .joint import JointText
from .streams import Text
from .walk import TextWalk


class LocalText(Formulation):
    """An ordinary causal pass; a block starts from what the blocks before it made of the text. There is no noise: at the
    paper's highest level, where the target is out of sight, this is what its denoiser learns. In use it is the plain model.
    """

    passes_on = runs_stock = True
    walks = False  #: whether a token's logits are the end of a walk

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
        found = self.model.backbone(**{**x, **stock})
        if labels is None:
            return found
        vocab_size = self.model.backbone.config.get_text_config().vocab_size
        loss = self.model.loss_function(found.logits, labels, vocab_size, num_items_in_batch=num_items)
        return type(found)(loss=loss, **found)  # (not its own: some expect labels that are shifted before)

    def loss(self, inputs: Mapping, labels: torch.Tensor, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
        """The mean cross-entropy of what the stock model takes, without ever holding all logits."""
        return self.model.mean_loss(self.model.blocks[-1], [self._last_hidden(inputs)[:, :-1]], labels[:, 1:], num_items)

    def _last_hidden(self, inputs: Mapping) -> torch.Tensor:
        """What the head reads, `[N, S, D]`."""
        return base_of(self.model.backbone, self.model.layers_path)(**inputs).last_hidden_state

    def block_logits(self, x: Mapping) -> torch.Tensor:
        """Every block's, `[N, B, S, V]`."""
        entering, found = None, []
        for block in self.model.blocks:
            entering, read = block.run_stock(x, entering)
            found.append(block.head(read.flatten(0, 1)).unflatten(0, read.shape[:2]))
        return torch.stack(found, 1)

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


class DiffusionBlocksForCausalLM(DiffusionBlocksPreTrainedModel, WalkGeneration, GenerationMixin):
    """A decoder whose blocks predict the next token, each by itself.

    Recommended: each on the cross-entropy of what it has made of the text; the whole is used as the plain model is. The
    paper's (arXiv 2506.14202, appendix on text): each a denoiser of the next token's embedding, at its own noise levels.
    """

    main_input_name = "input_ids"
    task = "text-generation"
    reads_rows, sees_later_tokens = True, False
    FORMULATIONS = {"recommended": LocalText, "paper": JointText}
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every token of a step counts alike

    def __init__(self, config: DiffusionBlocksConfig):
        self._check_task(config)
        if getattr(config.source_config, "is_causal", None) is False:  # it would see the tokens that it has to predict
            raise ValueError("is_causal=False in the plain model's config must be True, or absent, to predict next tokens")
        super().__init__(config)
        self.target_embeddings: nn.Module | None = None
        if self.formulation.modulated and self.sharing.own_modules:
            self.target_embeddings = FixedTargets(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if self.FORMULATIONS[self.config.preset].walks and requested_attention not in (None, "sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={requested_attention!r} must be 'sdpa' or 'eager' with preset='paper': a noisy token sees "
                "the clean ones before it and itself, a mask that the others ignore or cannot express"
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def copy_weights(self, plain: nn.Module) -> None:
        super().copy_weights(plain)
        if self.target_embeddings is not None:
            self.target_embeddings.table.copy_(plain.get_input_embeddings().weight)

    def target_vectors(self) -> torch.Tensor:
        """All targets e_v, `[V, D]` float32 of norm 1, without gradient: input embeddings, or the fixed table."""
        if self.target_embeddings is not None:
            return self.target_embeddings.vectors()
        embedding = self.get_input_embeddings()
        with weights_on_device(embedding):
            weight = embedding.weight.detach()
        return F.normalize(weight.float(), dim=-1)

    def _resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        """Also of the heads that blocks have of their own, and of fixed targets."""
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.num_embeddings
        for block in self.blocks:
            parts = block.readout_parts
            if parts is not self.backbone:
                trained = parts.lm_head.weight.requires_grad
                parts.lm_head = self._get_resized_lm_head(parts.lm_head, size, mean_resizing=mean_resizing)
                parts.lm_head.requires_grad_(trained)
        if self.target_embeddings is not None:
            self.target_embeddings.resize(size)
        return embeddings

    # ---- training and evaluation

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        block_index: int | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        text_walk: TextWalk | None = None,
        num_steps: int | None = None,
        block_input: Any = None,
        **stock,
    ) -> CausalLMOutputWithPast:
        """Train one block (`block_index` given), or predict next tokens.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep: as in
                the plain model.
            labels: `[N, S]`, usually `input_ids`: shifted here, -100 has no loss.
            block_index: the block to train. Needs `labels`. The paper's logits are then those of p(token | before, z) with
                the true token inside z: their cross-entropy is a training loss, not a likelihood.
            sigma: the paper's: noise levels to train at, `[N]`; drawn for the block when None, one a sequence.
            noise: the paper's: standard normal `[N, S-1, D]`; drawn when None.
            generator: of the draws; or one a sequence, N of them.
            num_items_in_batch: tokens that the summed loss is divided by; None is those of this batch.
            return_logits: whether to return all logits; None returns them unless a block is trained. False: rows are read
                out in chunks, and no more logits are held (but at the end of a walk).
            text_walk: what [`generate`] keeps from token to token.
            num_steps: the paper's: denoiser evaluations of a walk; None is `config.num_inference_steps`.
            block_input: what has left the block before, as it gives it, where the earlier blocks are not run.
            stock: prediction: what else the plain model takes (`output_hidden_states`, ...).

        Returns:
            `loss` (with labels) and `logits`: of a block, `[N, S-1, V]`, for tokens 1 to S-1, and `hidden_states`, what has
            left it, without gradient (a tuple of one, for the next). Without `block_index`
            `[N, S, V]`, for the tokens after each, and label-free: recommended, what the plain model gives; the paper's,
            the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training; an argument is not of this formulation or out
                of range; or `inputs_embeds` are given to blocks that have embeddings of their own.
        """
        if inputs_embeds is not None and self.blocks[-1].embeds_apart:
            raise ValueError("inputs_embeds must be None with shared='per_block': each block embeds tokens by itself")
        self.check_block_given(block_index, labels)
        x = self.stock_inputs({
            "input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask,
            "position_ids": position_ids, "past_key_values": past_key_values,
        })  # fmt: skip
        draws = {"sigma": sigma, "noise": noise, "generator": generator}
        if block_index is None:
            self.refuse({**draws, "block_input": block_input}, "without block_index: it is of a block that trains")
            stock |= {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
            return self.formulation.predict(x, labels, num_items_in_batch, return_logits, text_walk, num_steps, **stock)
        self.refuse(
            {**stock, "num_steps": num_steps}, "with block_index, which has a loss of its own: leave it out of the batch"
        )
        block, targets = self.blocks[block_index], labels[:, 1:]
        leaving, rows = self.formulation.train(block, x, targets, block_input, draws)
        loss = self.mean_loss(block, rows, targets, num_items_in_batch)
        logits = self.logits(block_index, *rows) if return_logits else None
        leaving = tree_map_only(torch.Tensor, torch.Tensor.detach, leaving)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(leaving,))

    # ---- one block

    def logits(self, block_index: int, *rows: torch.Tensor) -> torch.Tensor:
        """Logits `[N, S-1, V]` of one block, from rows `[N, S-1, ...]`."""
        flat = [each.flatten(0, 1) for each in rows]
        return self.formulation.logits(self.blocks[block_index], *flat).unflatten(0, rows[0].shape[:2])

    def mean_loss(self, block: Block, rows: Sequence[torch.Tensor], targets: torch.Tensor, num_items) -> torch.Tensor:
        """The mean cross-entropy of labelled tokens, read out in chunks of rows `[N, S-1, ...]`."""
        rows, targets = [each.flatten(0, 1) for each in rows], targets.flatten()
        vocab_size = self.backbone.config.get_text_config().vocab_size
        with block.reading_out() as (head, parameters):
            read = head if self.formulation.runs_stock else partial(self.formulation.logits, block)
            total = chunked_cross_entropy(read, rows, targets, parameters, vocab_size)
        return total / num_counted(targets, num_items, self.training)

    def stock_inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = {name: value for name, value in batch.items() if value is not None and name in Text._fields}
        return {"use_cache": False, **given}

    # ---- what the blocks say

    def likelihood_terms(
        self, batch: Mapping[str, torch.Tensor], num_samples: int, generator: torch.Generator
    ) -> LikelihoodTerms:
        """What `nll_bound` sums up."""
        return self.formulation.likelihood_terms(batch, num_samples, generator)

    def block_logits(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Label-free logits of every block, `[N, B, S, V]`: through its local head, if it has one; the paper's at sigma_max,
        from the walk's (keyed) starting noise, where only block 0 has been trained."""
        return self.formulation.block_logits(
            self.stock_inputs({"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids})
        )

    @torch.no_grad()
    def trajectory(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, num_steps: int | None = None
    ) -> torch.Tensor:
        """The walk to the token after a text: its probabilities at each of T evaluations, from the highest noise down,
        `[N, T, V]`; from keyed noise, as greedy search has it. `num_steps` is T, as in `forward`.

        Raises:
            ValueError: the formulation walks nowhere; or `num_steps` is out of range.
        """
        if not self.formulation.walks:
            raise ValueError(f"preset={self.config.preset!r} must be 'paper': no other walks to a token")
        last = torch.tensor([input_ids.shape[1] - 1], device=self.device)
        positions = None if attention_mask is None else positions_of(attention_mask)
        text = Text(input_ids, attention_mask=attention_mask, position_ids=positions)
        return TextWalk(self, num_steps=num_steps).trajectory(text, last)[:, 0]
