"""What `diffusionblocks generate` does with masked diffusion: a prompt, and how it goes on; or its masks, filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import TextDiffusionStreamer

from ...configuration import option
from ...processors import load_tokenizer
from .model import DiffusionBlocksForMaskedLM

DEFAULT_NEW_TOKENS = 50


@dataclass
class MaskedTextOptions:
    prompt: str | None = option(None, "Masked text: what it begins with; or a text with mask tokens, which are filled in.")
    max_new_tokens: int | None = option(None, f"Masked text: tokens to add. Not given: {DEFAULT_NEW_TOKENS}.")
    num_inference_steps: int | None = option(
        None, "Masked text: steps, for all tokens. Not given: the model's own, else one token a step."
    )
    block_length: int | None = option(None, "Masked text: write in parts of so many tokens. Not given: as a whole.")
    remasking: str | None = option(
        None, "Masked text: which tokens a step reveals, 'random' or 'low_confidence'. Not given: 'random'."
    )
    temperature: float | None = option(None, "Masked text: sample at this temperature; 0 takes the likeliest. Not given: 1.")
    top_p: float | None = option(None, "Masked text: sample from the likeliest tokens of this probability. Not given: 1.")
    drafts: bool = option(False, "Masked text: show it as it is unmasked, on a terminal.")


class Drafts(TextDiffusionStreamer):
    """Prints drafts with their mask tokens, and the finished text without any special token."""

    def put_draft(self, value: torch.Tensor, **kwargs) -> None:
        of_text, self.decode_kwargs = self.decode_kwargs, {}
        super().put_draft(value, **kwargs)
        self.decode_kwargs = of_text


def generate(source: str, options: MaskedTextOptions, seed: int | None, load: Callable[[], DiffusionBlocksForMaskedLM]) -> None:
    """Print the prompt and what follows, by the model's `generate`; or, if it holds mask tokens, the text of `infill`.

    Args:
        source: saved model, with its tokenizer.
        seed: of what is drawn; None is none.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    given = {name: value for name, value in asdict(options).items() if value is not None}
    drafts = given.pop("drafts")
    if not (prompt := given.pop("prompt", "")):
        raise ValueError("--prompt must be a text to begin with, or one with mask tokens")
    tokenizer = load_tokenizer(source)
    encoded = tokenizer(prompt, return_tensors="pt", return_special_tokens_mask=True)
    input_ids, has_masks = encoded.input_ids, tokenizer.mask_token_id in encoded.input_ids[0].tolist()
    for name in ("max_new_tokens", "block_length"):
        if has_masks and name in given:
            raise ValueError(f"--{name} {given[name]} is not for a --prompt with mask tokens: these are filled in")
    if seed is not None:
        given["generator"] = torch.Generator().manual_seed(seed)
    if drafts:
        given["streamer"] = Drafts(tokenizer, skip_special_tokens=True)
    model = load()
    if has_masks:
        (written,) = model.infill(input_ids.to(model.device), **given)
    else:
        if encoded.special_tokens_mask[0, -1]:  # BERT's tokenizer closes a text, and this one is to go on
            input_ids = input_ids[:, :-1]
        given.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
        (written,) = model.generate(input_ids.to(model.device), **given)
    if not drafts:
        print(tokenizer.decode(written, skip_special_tokens=True))
