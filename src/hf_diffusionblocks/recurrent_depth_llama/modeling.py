"""A Llama of recurrent depth: prelude, a core that runs several times over, coda.

Sources: Geiping et al. 2025 (arXiv 2502.05171), section 3; the layers are those of Transformers' Llama.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer, LlamaPreTrainedModel, LlamaRMSNorm, LlamaRotaryEmbedding,
)  # fmt: skip
from transformers.utils.generic import can_return_tuple

from ..cache_name import CACHE
from ..diffusion.randomness import noise_of_positions
from ..whole_numbers import check_whole
from .configuration import RecurrentDepthLlamaConfig

#: Standard deviation of the logarithm of the rate that numbers of core runs are drawn at (the paper's).
RATE_SPREAD = 0.5


class RecurrentDepthLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = RecurrentDepthLlamaConfig
    config: RecurrentDepthLlamaConfig
    accepts_loss_kwargs = True
    _can_compile_fullgraph = False  # a static cache has a slot a layer, and the core needs one a run
    _can_record_outputs = {}


class SlotsOfRun:
    """A cache, as the layers of one run are given it: each run of a layer has a slot of its own."""

    def __init__(self, cache: Cache, offset: int):
        self.cache, self.offset = cache, offset

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *args, **kwargs):
        return self.cache.update(keys, values, layer_index + self.offset, *args, **kwargs)


class RecurrentDepthLlamaModel(RecurrentDepthLlamaPreTrainedModel):
    """Tokens to the hidden states that the head reads.

    `e = prelude(tokens)`; `state = core(adapter([state ; e]))`, run after run, from noise; `norm(coda(state))`.
    """

    def __init__(self, config: RecurrentDepthLlamaConfig):
        super().__init__(config)
        width, ends = config.hidden_size, config.num_prelude_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.prelude = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(ends))
        self.adapter = nn.Linear(2 * width, width, bias=False)
        #: The core's, then the coda's: all that a noisy token runs through in a model of blocks.
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(ends, config.num_layers))
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[N, S, D]`, final norm applied; arguments as in [`RecurrentDepthLlamaForCausalLM`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        steps = self._num_steps(num_steps)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0
        if past_key_values is not None:
            self._check_slots(past_key_values, steps)
            past = past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
            if attention_mask is not None and attention_mask.dim() == 2:  # the state's noise is keyed by position
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
            **{CACHE: past_key_values},
        )  # fmt: skip
        attention = {
            "attention_mask": mask, "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(embeds, position_ids=position_ids),
        }  # fmt: skip
        hidden = self._run_all(embeds, position_ids, past_key_values, steps, attention)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: past_key_values})

    def _run_all(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, cache: Cache | None, steps: int, attention: dict[str, Any]
    ) -> torch.Tensor:
        core, coda = self.layers[: self.config.num_core_layers], self.layers[self.config.num_core_layers :]

        def run(layers: Sequence[nn.Module], hidden: torch.Tensor, earlier_runs: int = 0) -> torch.Tensor:
            slots = None if cache is None else SlotsOfRun(cache, earlier_runs * len(core))
            for layer in layers:
                hidden = layer(hidden, **{CACHE: slots}, **attention)
            return hidden

        prelude_output, state = run(self.prelude, embeds), self._initial_state(embeds, position_ids)
        without_gradient = max(steps - self.config.num_backprop_steps, 0)
        for step in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without_gradient):
                state = run(core, self.adapter(torch.cat([state, prelude_output], -1)), step)
            if step == without_gradient - 1:
                torch.clear_autocast_cache()  # autocast keeps what it casts, and these casts pass no gradient on
        return run(coda, state, steps - 1)

    def _num_steps(self, num_steps: int | None) -> int:
        """How often the core runs: as asked for; else drawn in training, and otherwise what training has about at its mean."""
        if num_steps is None:
            return draw_num_steps(self.config.mean_recurrence) if self.training else self.config.mean_recurrence
        check_whole("num_steps", num_steps, 1, ", or None")
        return num_steps

    def _initial_state(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Noise, `[N, S, D]`: drawn in training; in evaluation a function of seed and position alone."""
        if self.training:
            noise = torch.randn_like(embeds)
        else:
            positions = position_ids.expand(embeds.shape[:2])
            noise = noise_of_positions(positions.flatten(), self.config.hidden_size, self.config.inference_seed)
            noise = noise.to(embeds.dtype).view(embeds.shape)
        return self.config.initial_state_std * noise

    def _check_slots(self, cache: Cache, steps: int) -> None:
        """A slot for each layer of each run: caches without a fixed number of them grow theirs."""
        wanted = self.config.num_layers + (steps - 1) * self.config.num_core_layers
        fixed = cache.layer_class_to_replicate is None
        if len(cache.layers) != wanted and (fixed or cache.get_seq_length()):
            raise ValueError(
                f"past_key_values has {len(cache.layers)} slots and must have {wanted} for num_steps={steps}, one for each run "
                "of a layer: go on with the num_steps that it was filled with, or begin with an empty DynamicCache()"
            )


def draw_num_steps(mean_recurrence: int) -> int:
    """How often the core runs in a training step: `1 + Poisson(rate)`, `ln rate ~ N(ln mean - 1/8, 1/2)`."""
    rate = torch.empty(()).log_normal_(math.log(mean_recurrence) - RATE_SPREAD**2 / 2, RATE_SPREAD)
    return 1 + int(torch.poisson(rate))


class RecurrentDepthLlamaForCausalLM(RecurrentDepthLlamaPreTrainedModel, GenerationMixin):
    """A language model whose depth is chosen when it is used: `generate(..., num_steps=8)`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecurrentDepthLlamaConfig):
        super().__init__(config)
        self.model = RecurrentDepthLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, *args, tokenizer=None, **kwargs):
        # (`generate` hands the tokenizer of stopping criteria on to every model.)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_steps: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits `[N, S, V]` of the tokens after each, and, with `labels`, their mean cross-entropy.

        Args:
            num_steps: how often the core runs; None is `mean_recurrence`, and in training drawn at random around it.
            past_key_values, cache: an empty `DynamicCache()`, or one filled with the same `num_steps`, by either name.
            output_attentions, output_hidden_states: None or False; PEFT names them.

        The others are as in `LlamaForCausalLM`. Gradients run through the last `num_backprop_steps` runs of
        the core.

        Raises:
            ValueError: `num_steps` is no whole number from 1, or not what the cache was filled with; or attentions or hidden
                states are asked for.
        """
        for name, asked in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if asked:
                raise ValueError(f"{name}={asked} must be False: a layer of the core has as many as there are runs")
        if use_cache is None and labels is not None:
            use_cache = False  # nobody goes on from a text that is scored
        past_key_values = past_key_values if cache is None else cache
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, num_steps)
        logits, loss = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs.past_key_values})

    def generate(self, *args, num_steps: int | None = None, **kwargs):
        """As in Transformers. `num_steps` is how often the core runs for each token; None is `mean_recurrence`."""
        return super().generate(*args, num_steps=self.config.mean_recurrence if num_steps is None else num_steps, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} must be None or 'dynamic': the number of slots "
                "depends on num_steps, and others are of a fixed number"
            )
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and CACHE in model_kwargs:
            model_kwargs[CACHE] = DynamicCache()  # of no fixed number of slots
