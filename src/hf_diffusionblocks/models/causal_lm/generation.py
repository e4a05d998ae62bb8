"""Generation of text: as in Transformers, with a walk to each token with `preset="paper"`."""

from __future__ import annotations

import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode

from .walk import TextWalk

SEARCHES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
#: Arguments of `generate` that ask for another search.
OTHER_SEARCHES = (
    "num_beams", "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens",
    "assistant_early_exit", "use_mtp",
)  # fmt: skip
#: Those of controls that count how often they are called: once a token, where a walk calls them once a step.
STATEFUL = ("guidance_scale", "watermarking_config")


def _refusal(asked: str, why: str) -> ValueError:
    return ValueError(f"{asked} must not be given with preset='paper': {why}")


class WalkGeneration(GenerationMixin):
    """The part of a text model that generates."""

    def generate(self, *args, **kwargs):
        """As in Transformers; a recommended model is the plain model in this, and a plain model generates.

        The paper's walks to one token a row at a time: it has greedy search and sampling. Greedy search walks from keyed noise
        and leaves the global generator alone; sampling draws from that, noise included, and with `top_k=1` is greedy search.
        `num_steps=K` walks in K evaluations of the denoiser.

        Raises:
            ValueError: the paper's model is asked for another search, or a recommended one for steps; names the argument.
        """
        if not self.formulation.walks:
            steps = kwargs.pop("num_steps", getattr(kwargs.get("generation_config"), "num_steps", None))
            if steps not in (None, 1):
                raise ValueError(f"num_steps={steps!r} must be 1 or None with preset='recommended': nothing walks to a token")
            self.backbone.generation_config = self.generation_config
            return self.backbone.generate(*args, **kwargs)
        if kwargs.get("assistant_model") is not None:
            raise _refusal(
                f"assistant_model={type(kwargs['assistant_model']).__name__}", "a walk makes one token a row at a time"
            )
        return super().generate(*args, **kwargs)

    def _prepare_generation_config(self, *args, **kwargs):
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if config.get_generation_mode() not in SEARCHES:
            asked = {name: getattr(config, name, None) for name in OTHER_SEARCHES}
            if asked["num_beams"] == 1:
                asked["num_beams"] = None
            given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
            raise _refusal(given, "a walk makes one token a row at a time, by greedy search or sampling")
        for name in STATEFUL:
            if (value := getattr(config, name, None)) not in (None, 1):
                raise _refusal(f"{name}={value!r}", "controls act at every step of a walk, and this one counts tokens")
        if config.do_sample and config.top_k == 1:
            config.do_sample = False  # nothing is left to draw but noise: this is greedy search
        return config, model_kwargs

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **model_kwargs):
        # Sampling controls act inside the walk, where they still can: its last logits are next to a point mass.
        steps = model_kwargs.get("num_steps", getattr(generation_config, "num_steps", None))
        model_kwargs["text_walk"] = TextWalk(self, logits_processor, generation_config.do_sample, steps)
        return super()._sample(input_ids, LogitsProcessorList(), stopping_criteria, generation_config, *args, **model_kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds: torch.Tensor | None = None, text_walk: TextWalk | None = None, **kwargs
    ):
        kwargs.pop("tokenizer", None)  # (of stopping criteria: stock models take what they do not know, and ignore it)
        prepared = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if isinstance(prepared.get("attention_mask"), dict):
            # A mask for each kind of layer, made for a static cache: these models have one kind.
            prepared["attention_mask"] = prepared["attention_mask"]["full_attention"]
        if text_walk is not None:
            text_walk.generated = input_ids
            prepared["text_walk"] = text_walk
        return prepared
