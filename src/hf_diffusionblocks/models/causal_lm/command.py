"""What `diffusionblocks generate` does with a model of text: a prompt, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ...configuration import option
from ...processors import load_tokenizer
from .model import DiffusionBlocksForCausalLM

DEFAULT_NEW_TOKENS = 50


@dataclass
class TextOptions:
    prompt: str | None = option(None, "Text: what it begins with.")
    max_new_tokens: int | None = option(None, f"Text: tokens to add, at most. Not given: {DEFAULT_NEW_TOKENS}.")
    temperature: float | None = option(None, "Text: sample at this temperature. Not given: what the generation config says.")
    top_p: float | None = option(None, "Text: sample from the likeliest tokens of this probability. Not given: the same.")
    num_steps: int | None = option(
        None, "Text: denoiser evaluations of a walk to a token (the paper's preset). Not given: the model's own."
    )


def generate(source: str, options: TextOptions, seed: int | None, load: Callable[[], DiffusionBlocksForCausalLM]) -> None:
    """Print the prompt and what follows, by the model's `generate`.

    Args:
        source: saved model, with its tokenizer.
        seed: of sampling; None is none.
    """
    given = {name: value for name, value in asdict(options).items() if value is not None}
    if not (prompt := given.pop("prompt", "")):
        raise ValueError("--prompt must be a text to begin with")
    if {"temperature", "top_p"} & set(given):
        given["do_sample"] = True
    given.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    tokenizer, model = load_tokenizer(source), load()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    (written,) = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **given)
    print(tokenizer.decode(written, skip_special_tokens=True))
