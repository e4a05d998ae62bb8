"""The paper's text: a stream of noisy tokens, modulated by sigma, that reads the clean one; a block starts from embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...cache_name import CACHE
from ...diffusion.gaussian import corrupt, precondition
from ...diffusion.objectives import LikelihoodTerms
from ..base import Formulation
from ..block import Block
from . import bound
from .streams import CleanKeys, Streams, Text
from .walk import TextWalk


class JointText(Formulation):
    """A noisy token per clean one: at the next one's position, it sees the clean tokens up to its own, and itself."""

    modulated = True
    walks = True  #: whether a token's logits are the end of a walk

    # ---- training

    def train(
        self, block: Block, x: Mapping, targets: torch.Tensor, block_input: torch.Tensor | None, noise: Mapping
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What has left the block, and what tokens 1 to S-1 are read out from, `[N, S-1, D]` both."""
        self.model.refuse({"block_input": block_input}, "with preset='paper': a block starts from embeddings")
        if not targets.shape[1]:
            raise ValueError(
                "labels of one token a text must be of at least 2: a block is trained on the tokens after the first"
            )
        model = self.model
        # One level a sequence, whose layers it modulates.
        sigma = model.draw_levels(block.index, targets.shape[:1], noise["sigma"], noise["generator"])[:, None]
        sigma = sigma.expand(targets.shape)
        y = F.embedding(targets.clamp(min=0), model.target_vectors())  # (what has no loss has no target: any will do)
        z = corrupt(y, sigma, noise["noise"], noise["generator"])
        hidden = self.run(block, Text.of(x), z, sigma)
        return hidden, (hidden, z, sigma)

    def run(self, block: Block, text: Text, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Noisy tokens through a block, `[N, S-1, D]`."""
        model = self.model
        streams = Streams(model, text.without_last(), torch.arange(z.shape[1], device=z.device), CleanKeys())
        streams.run_clean(block, streams.enter(block), block.clean_modulations())
        return streams.run_noisy(block, z, sigma, block.modulations(sigma[:, 0]))

    def logits(self, block: Block, hidden: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`[R, V]` of p(token | before, z), float32, of `[R, D]` and levels `[R]`, or `[1]`: the head on
        `(c_skip z + c_out F) / sigma_data`; at sigma_max, where c_out is sigma_data and c_skip nothing, it reads F as the plain
        model does."""
        parts, sigma_data = block.readout_parts, self.model.config.sigma_data
        c = precondition(sigma[:, None], sigma_data)
        normed = parts.get_submodule(self.model.architecture.final_norm_path)(hidden)
        estimate = c.skip / sigma_data * z + c.out / sigma_data * normed
        return parts.lm_head(estimate.to(normed.dtype)).float()

    # ---- prediction

    def predict(
        self, x: Mapping, labels, num_items, return_logits: bool | None, text_walk: TextWalk | None, num_steps: int | None,
        use_cache: bool | None = None, logits_to_keep: int | torch.Tensor = 0, cache=None, **stock,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Label-free logits `[N, Q, V]` of the tokens after the clean tokens that are kept: the end of a walk."""
        self.model.refuse(self.model.asked_of_stock_model(stock), "with preset='paper': it is for the plain model")
        model, config, text = self.model, self.model.config, Text.of(x)
        if cache is not None:  # (by the name that newer Transformers have)
            text = text._replace(past_key_values=cache)
        if use_cache is None:  # nobody goes on from a text that is scored
            use_cache = config.source_config.use_cache and labels is None and not model.training
        if use_cache and text.past_key_values is None:
            text = text._replace(past_key_values=DynamicCache(config=config.source_config))
        text_walk = text_walk or TextWalk(self.model, num_steps=num_steps)
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = torch.arange(text.tokens.shape[1], device=model.device)[-kept:]  # 0 keeps all
        logits, loss = text_walk.logits(text, kept), None
        if labels is not None:
            loss = model.loss_function(logits, labels, config.vocab_size, num_items_in_batch=num_items)
            logits = None if return_logits is False else logits
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: text.past_key_values})

    def block_logits(self, x: Mapping) -> torch.Tensor:
        """Every block's at sigma_max, from keyed noise: `[N, B, S, V]`."""
        return TextWalk(self.model).block_logits(Text.of(x))

    def likelihood_terms(
        self, batch: Mapping[str, torch.Tensor], num_samples: int, generator: torch.Generator
    ) -> LikelihoodTerms:
        return bound.likelihood_terms(self.model, batch, num_samples, generator)
