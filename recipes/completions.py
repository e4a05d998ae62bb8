"""Instruction data: prompts with completions, or chats; only completions have a loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from datasets import DatasetDict, Features, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_diffusionblocks.recipes import common
from hf_diffusionblocks.recipes.text import EvaluationText, Format, read_files

logger = logging.getLogger("hf_diffusionblocks.recipes.completions")

IGNORED = -100
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
#: For chats, where the tokenizer has no template of its own; saved with it.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

#: A part of a text, and whether its tokens have a loss.
Part = tuple[str, bool]


def columns_of(args) -> list[str]:
    """Names of the arguments that name columns of the data: a chat's, or a prompt's and a completion's."""
    return ["messages_column"] if args.messages_column else ["prompt_column", "completion_column"]


def load(args, seed: int) -> DatasetDict:
    """As [`common.load_data`], with these columns alone."""
    names = columns_of(args)
    data = common.load_data(args, names, lambda: read_files(args), seed, ordered=False)
    return data.select_columns([getattr(args, name) for name in names])


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args) -> DatasetDict:
    """`input_ids` and `labels` of every row that has a token with a loss, cut to `sequence_length`.

    Raises:
        ValueError: a row is no prompt with a completion, or no chat; or none is left.
    """
    if args.messages_column and not tokenizer.chat_template:
        logger.info("the tokenizer has no chat template: it gets a plain one, 'role: content' a line")
        tokenizer.chat_template = TEMPLATE
    encoded = DatasetDict()
    for split, rows in data.items():
        made = rows.map(
            partial(_encode_rows, tokenizer=tokenizer, args=args), batched=True, remove_columns=rows.column_names,
            features=FEATURES, desc=f"tokenize ({split})",
        )  # fmt: skip
        kept = made.filter(lambda row: any(label != IGNORED for label in row["labels"]))
        if len(kept) < len(made):
            logger.warning(
                f"{len(made) - len(kept)} of {len(made)} rows of the {split} data are left out: their completion is "
                f"empty, or begins beyond sequence_length={args.sequence_length}"
            )
        if not len(kept):
            raise ValueError(f"the {split} data has no completion within sequence_length={args.sequence_length}")
        encoded[split] = kept
    return encoded


def _encode_rows(columns: dict[str, list], tokenizer: PreTrainedTokenizerBase, args) -> dict[str, list[list[int]]]:
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    texts = [text for row in rows for text in _texts(row, tokenizer, args)]
    tokens = [_tokens(text, tokenizer, args.sequence_length) for text in texts]
    return {name: [each[name] for each in tokens] for name in FEATURES}


def _texts(row: dict, tokenizer: PreTrainedTokenizerBase, args) -> list[list[Part]]:
    """What a row says, cut where generation begins and ends: these are tokenized apart, as they are in use."""
    if args.messages_column:
        return _chat(row[args.messages_column], tokenizer, f"messages_column={args.messages_column!r}")
    prompt, completion = row[args.prompt_column], row[args.completion_column]
    for name, value in (("prompt_column", prompt), ("completion_column", completion)):
        if not isinstance(value, str):
            raise ValueError(f"{name}={getattr(args, name)!r} must hold text, a row holds {value!r}")
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _chat(chat, tokenizer, "the tokenizer's chat template") if completion else [[]]
    return [[(prompt, False), (completion + tokenizer.eos_token if completion else "", True)]]


def _chat(messages: Sequence[dict], tokenizer: PreTrainedTokenizerBase, source: str) -> list[list[Part]]:
    """The template's text; what follows each prompt for the assistant, to the end of its message, has a loss.

    A template may write an answer differently once the chat goes on (Qwen3 leaves out earlier thoughts): then each answer
    makes a text of its own, with what came before it.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in messages):
        raise ValueError(f"{source} must hold lists of messages with 'role' and 'content', a row holds {messages!r}")
    turns = []  # of the assistant: the text before, and the text with it
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if index == 0:
                raise ValueError(f"{source}: a chat must begin with another than the assistant, a row holds {messages!r}")
            prompt = _written(messages[:index], tokenizer, source, add_generation_prompt=True)
            answered = _written(messages[: index + 1], tokenizer, source)
            if not answered.startswith(prompt):
                raise ValueError(
                    f"{source}: with an answer, the chat template does not begin with what it writes to ask for it, so that "
                    "it does not tell what the assistant writes"
                )
            turns.append((prompt, answered))
    if all(prompt.startswith(before) for (_, before), (prompt, _) in pairwise(turns)):
        ends = ["", *(answered for _, answered in turns)]
        parts = [
            part
            for done, (prompt, answered) in zip(ends, turns)
            for part in ((prompt[len(done) :], False), (answered[len(prompt) :], True))
        ]
        return [parts]
    return [[(prompt, False), (answered[len(prompt) :], True)] for prompt, answered in turns]


def _written(messages: Sequence[dict], tokenizer: PreTrainedTokenizerBase, source: str, **kwargs) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        raise ValueError(f"{source}: the chat template says {error}, of {messages!r}") from None


def _tokens(parts: list[Part], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for number, (text, has_loss) in enumerate(parts):
        # A text begins as a prompt does in use. (A chat template writes such tokens itself.)
        special = number == 0 and not tokenizer.chat_template
        tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        input_ids += tokens
        labels += tokens if has_loss else [IGNORED] * len(tokens)
    return {"input_ids": input_ids[:length], "labels": [IGNORED, *labels[1:length]] if labels else []}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch, filled up on the right: no token sees what fills up, and none there has a loss, so no mask is needed."""
    longest = max(len(row["input_ids"]) for row in rows)
    filled = {
        name: [row[name] + [filler] * (longest - len(row[name])) for row in rows]
        for name, filler in (("input_ids", 0), ("labels", IGNORED))
    }
    return {name: torch.tensor(values) for name, values in filled.items()}


def evaluation_text(data, args) -> EvaluationText:
    """Of encoded rows."""
    num_tokens = sum(sum(label != IGNORED for label in labels) for labels in data["labels"])
    return EvaluationText(len(data), num_tokens, num_bytes=None)


FORMAT = Format(load, encode, collate, evaluation_text)
