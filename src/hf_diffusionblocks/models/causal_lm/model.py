"""Autoregressive text: x is the tokens before, y the L2-normalised embedding of the next one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...configuration import DiffusionBlocksConfig
from ...diffusion.gaussian import corrupt
from ...diffusion.objectives import IGNORED, chunked_sum, cross_entropy, rows_with_loss, weighted
from ...diffusion.randomness import Generators
from ...streaming import weights_on_device
from ..base import Clean, DiffusionBlocksPreTrainedModel
from ..block import Block
from ..targets import FixedTargets
from . import bound
from .factorized import FactorizedText
from .generation import WalkGeneration
from .joint import JointText
from .readouts import READOUTS
from .text import Rows, Text
from .walk import TextWalk


class DiffusionBlocksForCausalLM(DiffusionBlocksPreTrainedModel, WalkGeneration, GenerationMixin):
    """A decoder whose blocks are denoisers of the next token's embedding (arXiv 2506.14202, appendix on text).

    Factorized denoiser: layers see the tokens before, as in the plain model; the noise enters by Bayes' rule in the
    readout. Joint: a stream of noisy tokens, modulated by sigma, reads the keys and values of the clean stream.

    At sigma_max a noisy token says nothing of its target (1e-4 nats), and a factorized block is trained there on the
    plain cross-entropy of its prior.
    """

    main_input_name = "input_ids"
    task = "text-generation"
    DENOISERS = {"joint": JointText, "factorized": FactorizedText}
    clean_columns = ("input_ids", "attention_mask", "position_ids")
    default_overlap = 0.1
    default_bridge = "hard"
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every token of a step counts alike

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self.readout = READOUTS[config.readout](self)
        self.target_embeddings: nn.Module | None = None
        if self.sharing.fixed_targets:
            self.target_embeddings = FixedTargets(config.vocab_size, config.hidden_size)
        self.post_init()

    @classmethod
    def steps_for(cls, config: DiffusionBlocksConfig) -> int | None:
        return super().steps_for(config) if cls.DENOISERS[config.denoiser].walks else None

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        self.DENOISERS[self.config.denoiser].check_attention(requested_attention)
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
        if isinstance(weight, DTensor):  # FSDP gathers it for the embedding's own call only
            weight = weight.full_tensor()
        return F.normalize(weight.float(), dim=-1)

    def _resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        """What `resize_token_embeddings` does: also to the embeddings and heads that blocks have of their own, and to fixed
        targets.

        Raises:
            ValueError: blocks are not loaded; jobs would each draw new tokens, and targets, of their own.
        """
        if len(self.resident_blocks) < self.num_blocks:
            raise ValueError(
                f"resident_blocks={self.resident_blocks} must be all {self.num_blocks} to resize token embeddings: jobs "
                "would each draw new ones. Resize the whole model, save it, and load a part of that"
            )
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.num_embeddings
        path = next(name for name, module in self.backbone.named_modules() if module is embeddings)
        for block in self.blocks:
            if block.embeds_apart:
                self._get_resized_embeddings(block.embedding_parts.get_submodule(path), size, mean_resizing=mean_resizing)
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
        block_input: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Train one block (`block_index` given), or predict next tokens.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep: as in
                the plain model.
            labels: `[N, S]`, usually `input_ids`: shifted here, -100 has no loss.
            block_index: the block to train. Its logits are those of p(token | before, z) with the true token inside z:
                their cross-entropy is a training loss, not a likelihood. Needs `labels`.
            sigma: noise levels to train at, `[N]`, or (factorized) `[N, S-1]`: of tokens 1 to S-1; drawn for the block
                when None, one a token, or one a sequence for a joint denoiser, whose layers are modulated by it.
            noise: standard normal `[N, S-1, D]`; drawn when None.
            generator: of the draws; or one a sequence, N of them.
            num_items_in_batch: tokens that the summed loss is divided by; None is those of this batch.
            return_logits: whether to hold and return all logits; None returns them unless a block is trained. False: rows
                are read out in chunks, and no more logits are held. (A walk with gradients holds what these need.)
            text_walk: what [`generate`] keeps from token to token.
            num_steps: prediction: denoiser evaluations of a walk (joint); None is `config.num_inference_steps`.
            block_input: the hidden states `[N, S, D]` that enter the block, where the earlier blocks are not run but
                their output was cached.

        Returns:
            `loss` (with labels) and `logits`: of a block, `[N, S-1, V]`, for tokens 1 to S-1, and `hidden_states`, what has
            left it, without gradient (a tuple of one; factorized: `[N, S, D]`, for the next). Without `block_index`
            `[N, S, V]`, for the tokens after each, and label-free: factorized and carried, the last block's prior;
            factorized and independent, the mean of the blocks' log-priors; joint, the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training; `num_steps` is out of range; or
                `inputs_embeds` are given to blocks that have embeddings of their own.
        """
        if inputs_embeds is not None and self.blocks[-1].embeds_apart:
            raise ValueError("inputs_embeds must be None with shared='per_block': each block embeds tokens by itself")
        self.check_block_given(block_index, labels)
        text = Text(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, block_input)
        if block_index is None:
            text_walk = text_walk or self.denoiser.new_walk(num_steps)
            return self._predict(text, labels, use_cache, logits_to_keep, num_items_in_batch, return_logits, text_walk)
        block, targets = self.blocks[block_index], labels[:, 1:]
        sees_z = self.sees_z(sigma)
        sigma = self.levels(block_index, targets, sigma, generator)
        z = self.corrupt(targets, sigma, noise, generator) if sees_z else None
        leaving, read = self.denoiser.run(block, text, z, sigma)
        rows = Rows(read, z, sigma)
        loss = self._objective(block, rows, targets, num_items_in_batch)
        logits = self.logits(block_index, rows) if return_logits else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(leaving.detach(),))

    # ---- one block

    def levels(self, block_index: int, targets: torch.Tensor, sigma: torch.Tensor | None, generator) -> torch.Tensor:
        """Noise levels `[N, S-1]` float32 for the targets `[N, S-1]`: those given, or drawn for the block."""
        if sigma is None:
            sigma = self.draw_levels(block_index, self.denoiser.shape_of_levels(targets), generator)
        sigma = sigma.to(self.device, torch.float32)
        return (sigma if sigma.dim() == 2 else sigma[:, None]).expand(targets.shape)

    def corrupt(self, targets: torch.Tensor, sigma: torch.Tensor, noise, generator) -> torch.Tensor:
        """`z = y + sigma eps`, `[N, S-1, D]`."""
        # A token without loss has no target: any will do.
        return corrupt(F.embedding(targets.clamp(min=0), self.target_vectors()), sigma, noise, generator)

    def logits(self, block_index: int, rows: Rows) -> torch.Tensor:
        """Logits `[N, S-1, V]` of p(token | before, z) by one block, from rows `[N, S-1, ...]`."""
        return self.readout.logits(self.blocks[block_index], rows.flat()).unflatten(0, rows.sigma.shape)

    def _objective(self, block: Block, rows: Rows, targets: torch.Tensor, num_items) -> torch.Tensor:
        """The mean cross-entropy of labelled tokens, read out in chunks."""
        targets = targets.flatten()
        labelled = rows_with_loss(targets, at_most=len(targets))
        rows, targets = rows.flat().where(labelled), targets[labelled]
        vectors = None if rows.z is None else self.readout.targets()

        def loss_of_rows(hidden, targets, sigma, z=None):
            loss = cross_entropy(self.readout.logits(block, Rows(hidden, z, sigma), vectors), targets)
            return weighted(loss, self.config.loss_weighting, sigma, self.sigma_data).sum()

        tensors = [rows.hidden, targets, rows.sigma, *([] if rows.z is None else [rows.z])]
        return self.mean_of_rows(loss_of_rows, tensors, [block], num_items)

    def mean_of_rows(self, loss_of_rows, tensors, blocks: list[Block], num_items) -> torch.Tensor:
        """The sum of a loss over rows that these blocks read out, in chunks, over the number of targets or `num_items`.

        Args:
            tensors: hidden states, targets, and what else `loss_of_rows` takes, by row.
        """
        with ExitStack() as there:
            parameters = [parameter for block in blocks for parameter in there.enter_context(block.readout_on_device())]
            total = chunked_sum(loss_of_rows, tensors, list(dict.fromkeys(parameters)), self.config.vocab_size)
        return total / ((tensors[1] != IGNORED).sum().clamp(min=1) if num_items is None else num_items)

    def clean_input(self, batch: Mapping[str, torch.Tensor]) -> Clean:
        given = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        return self.clean(Text(*(batch.get(name) for name in given)))

    def clean(self, text: Text) -> Clean:
        """What embeds the clean tokens, and what attention takes to run them."""
        inputs, shape = text.positioned(), text.shape_in(self.dtype)
        mask = self.architecture.causal_mask(
            self.backbone, shape, text.attention_mask, text.position_ids, text.past_key_values
        )
        positions = self.architecture.positions(self.backbone, shape, inputs["position_ids"])
        return Clean(inputs, {"attention_mask": mask, "past_key_values": text.past_key_values, **positions})

    # ---- prediction

    def _predict(
        self, text: Text, labels, use_cache, logits_to_keep, num_items, return_logits, text_walk
    ) -> CausalLMOutputWithPast:
        if use_cache is None:  # nobody goes on from a text that is scored
            use_cache = self.config.source_config.use_cache and labels is None and not self.training
        if use_cache and text.past_key_values is None:
            text = text._replace(past_key_values=DynamicCache(config=self.config.source_config))
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = torch.arange(text.num_tokens, device=self.device)[-kept:]  # 0 keeps all
        if labels is not None and return_logits is False:
            loss = self.denoiser.loss(text, labels, num_items, text_walk)
            return CausalLMOutputWithPast(loss=loss, past_key_values=text.past_key_values)
        logits, loss = self.denoiser.predict(text, kept, text_walk), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=text.past_key_values)

    likelihood_terms = bound.likelihood_terms  #: what `nll_bound` sums up

    def prior_logits(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Label-free logits of every block at sigma_max, `[N, B, S, V]`.

        A joint network is fed the walk's (keyed) starting noise. Only block 0 trains at sigma_max by itself; the
        others do for `prior_fraction` of their draws.
        """
        return self.denoiser.prior_logits(Text(input_ids, None, attention_mask, position_ids))

    @torch.no_grad()
    def trajectory(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, num_steps: int | None = None
    ) -> torch.Tensor:
        """The walk to the token after a text: its probabilities at each of T evaluations, from the highest noise down,
        `[N, T, V]`; from keyed noise, as greedy search has it. `num_steps` is T, as in `forward`.

        Raises:
            ValueError: the denoiser is factorized, and walks nowhere; or `num_steps` is out of range.
        """
        if not self.denoiser.walks:
            raise ValueError(f"denoiser={self.config.denoiser!r} must be 'joint': no other walks to a token")
        last = torch.tensor([input_ids.shape[1] - 1], device=self.device)
        positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # as generate's
        text = Text(input_ids, None, attention_mask, positions)
        return self.denoiser.new_walk(num_steps).trajectory(text, last)[:, 0]
