"""Generation of text: as in Transformers, with a walk to each token where the denoiser is joint."""

from __future__ import annotations

import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode

from .walk import TextWalk

JOINT_SEARCHES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
#: Arguments of `generate` that ask for another search.
OTHER_SEARCHES = (
    "num_beams", "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens",
    "assistant_early_exit", "use_mtp",
)  # fmt: skip


def _no_such_search(asked: str) -> ValueError:
    return ValueError(
        f"{asked}: with denoiser='joint' only greedy search and sampling are implemented: a walk makes one token a row "
        "at a time"
    )


class WalkGeneration(GenerationMixin):
    """The part of a text model that generates."""

    def generate(self, *args, **kwargs):
        """As in Transformers. A joint model walks to one token a row at a time: it has greedy search and sampling.

        Greedy search walks from keyed noise and leaves the global generator alone; sampling draws from that, noise
        included, and with `top_k=1` is greedy search. `num_steps=K` walks in K evaluations of the denoiser.

        Raises:
            ValueError: a joint model is asked for another search, or a factorized one for several steps; names the argument.
        """
        if self.denoiser.walks and kwargs.get("assistant_model") is not None:
            raise _no_such_search(f"assistant_model={type(kwargs['assistant_model']).__name__}")
        return super().generate(*args, **kwargs)

    def _prepare_generation_config(self, *args, **kwargs):
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if self.denoiser.walks and config.get_generation_mode() not in JOINT_SEARCHES:
            asked = {name: getattr(config, name, None) for name in OTHER_SEARCHES}
            if asked["num_beams"] == 1:
                asked["num_beams"] = None
            raise _no_such_search(", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None))
        if self.denoiser.walks and config.do_sample and config.top_k == 1:
            config.do_sample = False  # nothing is left to draw but noise: this is greedy search
        return config, model_kwargs

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **model_kwargs):
        if self.denoiser.walks:
            # Sampling controls act inside the walk, where they still can: its last logits are next to a point mass.
            steps = model_kwargs.get("num_steps")
            model_kwargs["text_walk"] = TextWalk(self, logits_processor, generation_config.do_sample, steps)
            logits_processor = LogitsProcessorList()
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, *args, **model_kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds: torch.Tensor | None = None, text_walk: TextWalk | None = None, **kwargs
    ):
        prepared = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if isinstance(prepared.get("attention_mask"), dict):
            # A mask for each kind of layer, made for a static cache: these models have one kind.
            prepared["attention_mask"] = prepared["attention_mask"]["full_attention"]
        if text_walk is not None:
            text_walk.generated = input_ids
            prepared["text_walk"] = text_walk
        return prepared
