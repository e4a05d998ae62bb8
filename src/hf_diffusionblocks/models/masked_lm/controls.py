"""What `generate` and `infill` are asked for: Transformers' names of it, how tokens are drawn, and where texts end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

from ...diffusion.randomness import Generators, draw, invert_cdf
from ...whole_numbers import is_whole, whole

logger = logging.get_logger(__name__)

REMASKING = ("random", "low_confidence")
#: Of `GenerationConfig`, what both take; and what is of new text alone.
CONTROLS = ("do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "return_dict_in_generate")
ENDS = ("max_new_tokens", "max_length", "eos_token_id", "pad_token_id")
#: Our own.
OWN = ("remasking", "generator")
#: Fields of a config that a result does not depend on.
WITHOUT_EFFECT = ("bos_token_id", "decoder_start_token_id", "use_cache", "transformers_version", "_from_model_config")
#: Fields that ask for nothing where they are 1; the others do not where they are None, 0 or False.
FACTORS = (
    "num_beams", "num_beam_groups", "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p",
    "guidance_scale",
)  # fmt: skip
#: What may be done instead.
INSTEAD = {
    "num_beams": "there is no beam search: temperature=0 or remasking='low_confidence' looks for likely texts",
    "repetition_penalty": "remasking='random' repeats itself least",
    "no_repeat_ngram_size": "remasking='random' repeats itself least",
    "min_p": "top_p and top_k leave unlikely tokens out",
    "typical_p": "top_p and top_k leave unlikely tokens out",
    "stopping_criteria": "eos_token_id ends texts; with block_length nothing is written after that",
    "stop_strings": "eos_token_id ends texts; with block_length nothing is written after that",
    "logits_processor": "temperature, top_k and top_p shape the draws",
}


def settle(caller: str, given: Mapping[str, Any], config: GenerationConfig | None, taken: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a config, and arguments over them, by name; without those that are None.

    Args:
        taken: of the fields of `GenerationConfig`.

    Raises:
        TypeError: the config is none.
        ValueError: something is asked for that is not taken; names it, what is, and what may be done instead.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config={type(config).__name__} must be a GenerationConfig of transformers")
    fields = {} if config is None else config.to_dict()
    asked = {name: value for name, value in fields.items() if name not in ENDS}
    for name, value in [*asked.items(), *given.items()]:
        if name not in (*taken, *OWN, *WITHOUT_EFFECT) and (name in ENDS or not _is_neutral(name, value)):
            names = ", ".join(("generation_config", *taken, *OWN))
            instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
            raise ValueError(f"{name}={value!r} is not taken{instead}. {caller} takes {names}")
    if {"max_new_tokens", "max_length"} & {name for name, value in given.items() if value is not None}:
        fields = {name: value for name, value in fields.items() if name not in ("max_new_tokens", "max_length")}
    settled = {name: value for name, value in fields.items() if name in (*taken, *OWN)} | dict(given)
    return {name: value for name, value in settled.items() if name in (*taken, *OWN) and value is not None}


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field of `GenerationConfig` asks for nothing."""
    if not hasattr(GenerationConfig(), name):
        return False
    if name in FACTORS and value == 1:
        return True
    return value is None or (not name.endswith("token_id") and value in (0, False))


def number_of_new(settled: Mapping[str, Any], prompt: int, longest: float) -> int:
    """Tokens to add to a prompt of so many, by `max_new_tokens` or else `max_length`.

    Raises:
        ValueError: neither is given, or there would be none, or more than the model has positions for.
    """
    if (new := settled.get("max_new_tokens")) is not None:
        new = whole("max_new_tokens", new, 1)
        asked = f"max_new_tokens={new} after {prompt}"
        if "max_length" in settled:
            logger.warning(f"max_length={settled['max_length']} is not looked at: max_new_tokens={new} is given, too")
    elif "max_length" in settled:
        new = whole("max_length", settled["max_length"], prompt + 1, f": prompts have {prompt} tokens") - prompt
        asked = f"max_length={new + prompt}"
    else:
        raise ValueError("max_new_tokens=None must be a whole number from 1, or max_length be given")
    if prompt + new > longest:
        raise ValueError(f"{asked} must make at most max_position_embeddings={longest}")
    return new


@dataclass(frozen=True)
class Sampling:
    """How masked tokens are chosen and drawn.

    Args:
        remasking: which tokens a step reveals: "random", or "low_confidence": those whose drawn token is the most likely
            (the rest stay masked), which reads better at few steps, and is not the sampler of the bound.
        do_sample: whether tokens are drawn; False takes the likeliest, as temperature 0 does. None: drawn, unless that is 0.
        temperature: of the draws.
        top_k: draw from so many of the likeliest tokens; 0 is all.
        top_p: draw from the likeliest tokens that have this probability together.
        generator: of all draws; or one a text, N of them.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """

    remasking: str = "random"
    do_sample: bool | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: Generators = None

    def __post_init__(self):
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking={self.remasking!r} must be one of {', '.join(map(repr, REMASKING))}")
        if self.do_sample not in (None, True, False):
            raise ValueError(f"do_sample={self.do_sample!r} must be True, False or None")
        whole("top_k", self.top_k, 0)
        for name, allowed, holds in (
            ("temperature", "a finite number from 0", lambda value: 0 <= value < math.inf),
            ("top_p", "a number above 0 and at most 1", lambda value: 0 < value <= 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
                raise ValueError(f"{name}={value!r} must be {allowed}")
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature=0 must be above 0 with do_sample=True: it takes the likeliest tokens")
        if self.do_sample is False and (self.temperature not in (0, 1) or self.top_k or self.top_p < 1):
            logger.warning_once("do_sample=False takes the likeliest tokens: temperature, top_k and top_p do nothing")

    @property
    def is_greedy(self) -> bool:
        return self.do_sample is False or self.temperature == 0

    def draw_tokens(self, logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """A token `[R]` for each row of logits `[R, V]`, which are of the positions `where` of texts (bool, `[N, S]`)."""
        if self.is_greedy:
            return logits.argmax(-1)
        if self.temperature != 1:  # (any that is a number: the largest logit stays 0, and MASK -inf)
            logits = (logits - logits.amax(-1, keepdim=True)).double() / float(self.temperature)
        warpers = [TopKLogitsWarper(int(self.top_k))] if self.top_k else []
        warpers += [TopPLogitsWarper(float(self.top_p))] if self.top_p < 1 else []
        for warper in warpers:
            logits = warper(None, logits)
        # In float64: the noise of float32 draws would lower the temperature, and say nothing (arXiv 2409.02908).
        uniform = draw(torch.rand, where.shape, self.generator, dtype=torch.float64).to(where.device)
        return invert_cdf(logits, uniform[where][:, None])


@dataclass(frozen=True)
class Ends:
    """Where new text ends.

    Args:
        tokens: any of them is the last of its text.
        padding: the token that stands after it.
        start: where the new text begins.
    """

    tokens: tuple[int, ...]
    padding: int
    start: int

    @classmethod
    def of(cls, settled: Mapping[str, Any], start: int, vocab_size: int, mask_token_id: int) -> Ends | None:
        """None where no token ends a text.

        Raises:
            ValueError: a token is none, or MASK.
        """
        given = settled.get("eos_token_id", ())
        tokens = given.tolist() if torch.is_tensor(given) else given
        tokens = tuple(tokens) if isinstance(tokens, (list, tuple)) else (tokens,)
        padding = settled.get("pad_token_id", tokens[0] if tokens else 0)
        for name, value, numbers in (("eos_token_id", given, tokens), ("pad_token_id", padding, (padding,))):
            if not all(is_whole(number, 0) and number < vocab_size and number != mask_token_id for number in numbers):
                raise ValueError(f"{name}={value!r} must be in 0..{vocab_size - 1}, and not mask_token_id={mask_token_id}")
        return cls(tokens, padding, start) if tokens else None

    def after(self, sequences: torch.Tensor) -> torch.Tensor:
        """Which tokens of texts `[N, S]` come after an end; bool, `[N, S]`."""
        ends = torch.isin(sequences, torch.tensor(self.tokens, device=sequences.device)).long()
        ends[:, : self.start] = 0
        return ends.cumsum(1) > ends
