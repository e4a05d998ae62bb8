"""What the recipes that tune diffusion models of text on answers share: examples, prompts and answers as tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_diffusionblocks.extras import from_extra
from hf_diffusionblocks.recipes import text

with from_extra("trl", "fine-tuning of text", "sft"):
    from trl.data_utils import is_conversational, maybe_apply_chat_template

logger = logging.getLogger("hf_diffusionblocks.recipes.answers")

TOKENS = List(Value("int32"))


def examples_of(row: dict) -> Iterator[dict]:
    """A prompt and a completion for each answer in a row, text or messages.

    (Of a chat each answer is one by itself: tokens see what comes after them, and an answer must not be seen by what asks
    for it.)
    """
    if "messages" not in row:
        yield {"prompt": row["prompt"], "completion": row["completion"]}
        return
    for number, message in enumerate(row["messages"]):
        if number and message["role"] == "assistant":
            yield {"prompt": row["messages"][:number], "completion": [message]}


def tokens_of(example: dict, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Prompt and answer, which has an end token."""
    written = maybe_apply_chat_template(example, tokenizer)
    prompt = text.opened(written["prompt"], tokenizer, with_special_tokens=not is_conversational(example))
    answer, end = tokenizer(written["completion"], add_special_tokens=False)["input_ids"], text.end_token_id(tokenizer)
    return prompt, answer if end in answer else [*answer, end]


def tokenize(rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """All examples of the rows that are short enough: columns `prompt` and `answer`, tokens.

    Args:
        name: of the argument that names the rows.
        max_length: tokens of prompt and answer together.

    Raises:
        ValueError: there is none.
    """
    features = Features({"prompt": TOKENS, "answer": TOKENS})
    made = rows.map(
        _tokens_of_batch, batched=True, remove_columns=rows.column_names, features=features, desc=f"tokenizing {name}",
        fn_kwargs={"tokenizer": tokenizer},
    )  # fmt: skip
    kept = made.filter(lambda row: len(row["prompt"]) + len(row["answer"]) <= max_length)
    if left_out := len(made) - len(kept):
        logger.warning(f"{left_out} of {len(made)} answers of {name} are left out: longer than max_length={max_length}")
    if not len(kept):
        raise ValueError(f"{name} must have an answer that fits max_length={max_length}, and has none")
    return kept


def _tokens_of_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """(No closure: `datasets` could not tell whether it has changed since its results were cached.)"""
    split = [dict(zip(batch, values)) for values in zip(*batch.values())]
    made = [tokens_of(example, tokenizer) for row in split for example in examples_of(row)]
    return {"prompt": [prompt for prompt, _ in made], "answer": [answer for _, answer in made]}


def prompt_tokens(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A prompt as it is written, and its tokens: what a model is asked in use."""
    if isinstance(prompt, str):
        return prompt, text.opened(prompt, tokenizer, with_special_tokens=True)
    written = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return written, text.opened(written, tokenizer, with_special_tokens=False)


def check_end_token(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raises ValueError if the tokenizer of `model=source` has nothing that ends an answer."""
    if text.end_token_id(tokenizer) is None:
        raise ValueError(f"model={source!r} must have a tokenizer with an end token (eos_token or sep_token)")
