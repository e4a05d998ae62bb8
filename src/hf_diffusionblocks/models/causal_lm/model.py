"""Autoregressive text: x is the tokens before, y the L2-normalised embedding of the next one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...configuration import DiffusionBlocksConfig
from ...diffusion.gaussian import Preconditioning, edm_loss_weight, posterior_logits, precondition
from ...diffusion.randomness import Generators, draw
from ...diffusion.objectives import chunked_sum, cross_entropy
from ..base import DiffusionBlocksPreTrainedModel
from .generation import WalkGeneration
from .streams import CleanKeys, Rows, Streams
from ..targets import FixedTargets
from .walk import TextWalk

IGNORED = -100  # label of a token that has no loss, everywhere in Transformers


class DiffusionBlocksForCausalLM(DiffusionBlocksPreTrainedModel, WalkGeneration, GenerationMixin):
    """A decoder whose blocks are denoisers of the next token's embedding (arXiv 2506.14202, appendix on text).

    Factorized denoiser: layers see the tokens before, as in the plain model; the noise enters by Bayes' rule in the
    readout. Joint: a stream of noisy tokens, modulated by sigma, reads the keys and values of the clean stream.

    At sigma_max a noisy token says nothing of its target (1e-4 nats), and a factorized block is trained there on the
    plain cross-entropy of its prior.
    """

    main_input_name = "input_ids"
    task = "text-generation"
    default_overlap = 0.1
    default_bridge = "hard"
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every token of a step counts alike

    def __init__(self, config: DiffusionBlocksConfig):
        if config.denoiser == "joint" and config.readout_layers:
            raise ValueError(
                f"readout_layers={config.readout_layers} must be 0 with denoiser='joint' for text: a noisy token's local "
                "head would need clean keys, and a cache, of its own"
            )
        super().__init__(config)
        if self.per_block:
            self.target_embeddings = FixedTargets(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if self.config.denoiser == "joint" and requested_attention not in (None, "sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={requested_attention!r} must be 'sdpa' or 'eager' with denoiser='joint': a noisy "
                "token sees the clean ones before it and itself, a mask that the others ignore or cannot express"
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def copy_weights(self, plain: PreTrainedModel) -> None:
        super().copy_weights(plain)
        if self.per_block:
            self.target_embeddings.table.copy_(plain.get_input_embeddings().weight)

    def target_vectors(self) -> torch.Tensor:
        """All targets e_v, `[V, D]` float32 of norm 1, without gradient: input embeddings, or per-block's fixed table."""
        if self.per_block:
            return self.target_embeddings.vectors()
        weight = self.get_input_embeddings().weight.detach()
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
        if self.per_block:
            size = embeddings.num_embeddings
            path = next(name for name, module in self.backbone.named_modules() if module is embeddings)
            for parts in () if self.carried else self.block_embeddings:  # (carried: tokens are embedded once)
                self._get_resized_embeddings(parts.get_submodule(path), size, mean_resizing=mean_resizing)
            for parts in self.block_readouts:
                trained = parts.lm_head.weight.requires_grad
                parts.lm_head = self._get_resized_lm_head(parts.lm_head, size, mean_resizing=mean_resizing)
                parts.lm_head.requires_grad_(trained)
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
        block_input: torch.Tensor | None = None,
        loss_block: int | None = None,
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
            block_input: the hidden states `[N, S, D]` that enter the block, where the earlier blocks are not run but
                their output was cached.
            loss_block: the block that is read out, after those between have run, too (factorized, carried); None is
                `block_index` itself. Parameters between get gradients unless they ask for none.

        Returns:
            `loss` (with labels) and `logits`: of a block, `[N, S-1, V]`, for tokens 1 to S-1. Without `block_index`
            `[N, S, V]`, for the tokens after each, and label-free: factorized and carried, the last block's prior;
            factorized and independent, the mean of the blocks' log-priors; joint, the end of the walk from keyed noise.

        Raises:
            ValueError: labels are missing for a block, or a block for training; or `inputs_embeds` are given to blocks
                that have embeddings of their own.
        """
        if inputs_embeds is not None and self.per_block and not self.carried:
            raise ValueError("inputs_embeds must be None with shared='per_block': each block embeds tokens by itself")
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if block_index is not None:
            inputs["block_input"] = block_input
            if labels is None:
                raise ValueError(f"labels=None with block_index={block_index}: a block is trained on the noised label")
            loss_block = self.loss_block_of(block_index, loss_block)
            rows, targets = self.noised_rows(
                block_index, inputs, attention_mask, position_ids, labels, sigma, noise, generator, loss_block
            )
            logits = None
            if return_logits:
                logits = self.denoise(loss_block, rows).unflatten(0, (len(labels), -1))
            loss = self._block_loss(loss_block, rows, targets, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        if self.training and labels is not None:
            raise ValueError(
                "block_index=None in training: pass the block to train (DiffusionBlocksTrainer does), or call "
                "model.eval() for the label-free loss"
            )
        return self._predict(
            inputs, attention_mask, position_ids, past_key_values, labels, use_cache, logits_to_keep,
            num_items_in_batch, return_logits, text_walk,
        )  # fmt: skip

    # ---- one block

    def noised_rows(
        self, block_index, inputs, attention_mask, position_ids, labels, sigma, noise, generator, loss_block=None
    ) -> tuple[Rows, torch.Tensor]:
        """A block's rows for tokens 1 to S-1, `[N * (S-1)]` of them, and these tokens."""
        targets = labels[:, 1:]
        if sigma is None:
            shape = targets.shape[:1] if self.joint else targets.shape
            sigma = self.draw_sigma(block_index, shape, generator)
        sigma = sigma.to(self.device, torch.float32)
        sigma = (sigma if sigma.dim() == 2 else sigma[:, None]).expand(targets.shape)
        z = None
        if self.joint or bool((sigma < self.config.sigma_max).any()):
            z = self._noised(targets, sigma, noise, generator)
        if self.joint:
            hidden = self._joint_hidden(block_index, inputs, attention_mask, position_ids, z, sigma)
        else:
            hidden = self._factorized_hidden(block_index, inputs, attention_mask, position_ids, loss_block)
        rows = Rows(hidden.flatten(0, 1), None if z is None else z.flatten(0, 1), sigma.flatten())
        return rows, targets.flatten()

    def _noised(self, targets: torch.Tensor, sigma: torch.Tensor, noise, generator) -> torch.Tensor:
        """`z = y + sigma eps`, `[N, S-1, D]`."""
        if noise is None:
            shape = (*targets.shape, self.config.hidden_size)
            noise = draw(torch.randn, shape, generator)
        # A token without loss has no target: any will do.
        clean = F.embedding(targets.clamp(min=0), self.target_vectors())
        return clean + sigma[..., None] * noise.to(self.device, torch.float32)

    def _factorized_hidden(self, block_index, inputs, attention_mask, position_ids, loss_block) -> torch.Tensor:
        inputs = self._positioned(inputs, position_ids)
        attention = self._attention(inputs, attention_mask)
        hidden = self.block_input(block_index, inputs, **attention)
        hidden = self.run_block(block_index, hidden, self.clean_modulations(block_index), **attention)
        if loss_block not in (None, block_index):
            hidden, block_index = self.carry_on(hidden, block_index, loss_block, **attention), loss_block
        return self.run_local_head(block_index, hidden, **attention)[:, :-1]

    def _joint_hidden(self, block_index, inputs, attention_mask, position_ids, z, sigma) -> torch.Tensor:
        # The last token is no context of any target.
        without_last = [None if tensor is None else tensor[:, :-1] for tensor in (*inputs.values(), attention_mask)]
        *tokens, attention_mask = without_last
        inputs = dict(zip(inputs, tokens))
        position_ids = None if position_ids is None else position_ids[:, :-1]
        inputs = self._positioned(inputs, position_ids)
        clean = self.block_input(block_index, inputs, **self._attention(inputs, attention_mask))
        kept = torch.arange(clean.shape[1], device=clean.device)
        streams = Streams(self, clean, attention_mask, inputs["position_ids"], kept, CleanKeys())
        streams.run_clean(block_index, clean, self.clean_modulations(block_index), output=False)
        c_in = precondition(sigma, self.sigma_data).input[..., None]
        noisy = self.embed_noisy(block_index, (c_in * z).to(clean.dtype), streams.noisy_position_ids)
        # With dropout, PyTorch's attention on the CPU keeps all scores: those that say nothing are worth leaving out.
        keeps_scores = noisy.device.type == "cpu" and self.training and self.architecture.attention_dropout(self.backbone)
        run = streams.run_noisy_in_groups if keeps_scores else streams.run_noisy
        return run(block_index, noisy, self.modulations_at(block_index, sigma[:, 0]))

    def clean_inputs(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
        inputs = self._positioned({"input_ids": batch["input_ids"], "inputs_embeds": None}, batch.get("position_ids"))
        return inputs, self._attention(inputs, batch.get("attention_mask"))

    def _positioned(self, inputs: dict, position_ids, past_key_values=None) -> dict:
        """What embeds the clean tokens: with their positions."""
        tokens = next(tensor for tensor in inputs.values() if tensor is not None)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        return {**inputs, "position_ids": position_ids}

    def _attention(self, inputs: dict, attention_mask, past_key_values=None) -> dict:
        """What the attention modules take to run the clean tokens."""
        shape, position_ids = self._shape(inputs), inputs["position_ids"]
        mask = self.architecture.causal_mask(self.backbone, shape, attention_mask, position_ids, past_key_values)
        positions = self.architecture.positions(self.backbone, shape, position_ids)
        return {"attention_mask": mask, "past_key_values": past_key_values, **positions}

    def _shape(self, inputs: dict) -> torch.Tensor:
        """Hidden states of no width, for their shape, dtype and device."""
        tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        return torch.empty((*tokens.shape[:2], 0), dtype=self.dtype, device=tokens.device)

    def embed_noisy(self, block_index: int, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`c_in z`, as tokens at their positions: `[N, Q, D]`."""
        return self.architecture.embed_noisy(self.embedding_parts(block_index), embeds, position_ids)

    def denoise(self, block_index: int, rows: Rows, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[R, V]` of p(token | before, z) by one block.

        Posterior readout: the head on F gives the prior, and z its likelihood.
        """
        hidden, z, sigma = rows
        if self.config.readout == "edm":
            return self.edm_logits(block_index, hidden, z, precondition(sigma[:, None], self.sigma_data))
        prior = self.read_out(block_index, hidden).float()
        if z is None or bool((sigma >= self.config.sigma_max).all()):
            return prior
        visible = torch.where(sigma < self.config.sigma_max, sigma, torch.inf)
        return posterior_logits(prior, z, visible, self.target_vectors() if targets is None else targets)

    def edm_logits(self, block_index: int, hidden: torch.Tensor, z: torch.Tensor, c: Preconditioning) -> torch.Tensor:
        """The head on `(c_skip z + c_out F) / sigma_data`, `[R, V]`: at sigma_max, where c_out is sigma_data and c_skip
        nothing, it reads F as the plain model does."""
        parts = self.readout_parts(block_index)
        normed = self.architecture.final_norm(parts, hidden)
        estimate = c.skip / self.sigma_data * z + c.out / self.sigma_data * normed
        return self.architecture.head(parts, estimate.to(normed.dtype)).float()

    def _block_loss(self, block_index, rows: Rows, targets: torch.Tensor, num_items) -> torch.Tensor:
        labelled = targets != IGNORED
        rows = Rows(*(tensor if tensor is None else tensor[labelled] for tensor in rows))
        targets = targets[labelled]
        vectors = None if rows.z is None or self.config.readout == "edm" else self.target_vectors()

        def loss_of_rows(hidden, targets, sigma, z=None):
            logits = self.denoise(block_index, Rows(hidden, z, sigma), vectors)
            loss = cross_entropy(logits, targets)
            if self.config.loss_weighting == "edm":
                loss = loss * edm_loss_weight(sigma, self.sigma_data)
            return loss.sum()

        tensors = [rows.hidden, targets, rows.sigma, *([] if rows.z is None else [rows.z])]
        return self._mean(loss_of_rows, tensors, [self.readout_parts(block_index)], num_items)

    def _mean(self, loss_of_rows, tensors, modules, num_items) -> torch.Tensor:
        parameters = [
            parameter
            for module in modules
            for path in self.architecture.readout_paths
            for parameter in module.get_submodule(path).parameters()
        ]
        total = chunked_sum(loss_of_rows, tensors, list(dict.fromkeys(parameters)), self.config.vocab_size)
        return total / (max(len(tensors[0]), 1) if num_items is None else num_items)

    # ---- prediction

    def _predict(
        self, inputs, attention_mask, position_ids, past_key_values, labels, use_cache, logits_to_keep, num_items,
        return_logits, text_walk,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        if use_cache is None:  # nobody goes on from a text that is scored
            use_cache = self.config.source_config.use_cache and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.source_config)
        inputs = self._positioned(inputs, position_ids, past_key_values)
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = torch.arange(inputs["position_ids"].shape[1], device=self.device)[-kept:]  # 0 keeps all
        if self.joint:
            text_walk = text_walk or TextWalk(self)
            if labels is not None and return_logits is False:
                following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
                nats = text_walk.losses(inputs, self._shape(inputs), attention_mask, kept, past_key_values, following)
                # Added up as a cross-entropy is, whose last bit it then has: each token's nats are those of its one class.
                total = F.nll_loss(-nats[:, None], following.clamp(max=0), reduction="mean" if num_items is None else "sum")
                loss = total if num_items is None else total / num_items
                return CausalLMOutputWithPast(loss=loss, past_key_values=past_key_values)
            logits = text_walk.logits(inputs, self._shape(inputs), attention_mask, kept, past_key_values)
        else:
            outputs = self.clean_outputs(inputs, **self._attention(inputs, attention_mask, past_key_values))
            outputs = outputs[-1:] if self.carried else outputs
            rows = torch.stack([hidden[:, kept] for hidden in outputs], 2)
            if labels is not None and return_logits is False:
                loss = self._prior_loss(rows[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items)
                return CausalLMOutputWithPast(loss=loss, past_key_values=past_key_values)
            logits = self._prior(rows)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prior(self, rows: torch.Tensor) -> torch.Tensor:
        """Label-free logits `[..., V]` from what left the blocks that have a say, `[..., 1 or B, D]`."""
        if self.carried:
            return self.read_out(self.num_blocks - 1, rows[..., 0, :])
        priors = [self.read_out(k, hidden).float().log_softmax(-1) for k, hidden in enumerate(rows.unbind(-2))]
        return torch.stack(priors).mean(0)

    def _prior_loss(self, rows: torch.Tensor, targets: torch.Tensor, num_items) -> torch.Tensor:
        labelled = targets != IGNORED
        read = range(self.num_blocks)[-1:] if self.carried else range(self.num_blocks)  # no other head has a gradient
        return self._mean(
            lambda rows, targets: cross_entropy(self._prior(rows).float(), targets).sum(),
            [rows[labelled], targets[labelled]],
            [self.readout_parts(k) for k in read],
            num_items,
        )

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
        inputs = self._positioned({"input_ids": input_ids, "inputs_embeds": None}, position_ids)
        if self.joint:
            return TextWalk(self).prior_logits(inputs, self._shape(inputs), attention_mask)
        attention = self._attention(inputs, attention_mask)
        outputs = self.clean_outputs(inputs, **attention)
        logits = [self.read_out(k, self.run_local_head(k, out, **attention)) for k, out in enumerate(outputs)]
        return torch.stack(logits, 1)
