"""Prompts and chats of the fine-tuning recipe: which tokens have a loss, and what cannot be read."""

from __future__ import annotations

import datasets
import pytest
from instruction_runs import (
    CHATS, LENGTH, PROMPTS, TRAINING, cross_entropy, files, instructions, model, plain, prompt_rows, tokenizer,
)  # fmt: skip
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusionblocks.recipes import completions, finetune_causal_lm

pytestmark = pytest.mark.usefixtures("own_cache")

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_only_completions_have_a_loss(tmp_path, files, model, plain, tokenizer):
    """And every token of them counts alike, however they fall into batches."""
    options = [*PROMPTS, "--learning_rate", "0", "--per_device_eval_batch_size", "5"]
    metrics = finetune_causal_lm.main([*model, *TRAINING, *files, *options, "--output_dir", str(tmp_path)])
    expected = cross_entropy(AutoModelForCausalLM.from_pretrained(plain), prompt_rows(tokenizer, 40, 61))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert "eval_bits_per_byte" not in metrics


def encoded(tokenizer, row: dict, length: int = LENGTH, **columns) -> dict:
    args = finetune_causal_lm.DataArguments(sequence_length=length, **columns)
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([row]))
    return completions.encode(data, tokenizer, args)["train"][0]


def with_loss(tokenizer, row: dict) -> str:
    return tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label != -100])


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain template", "the tokenizer's"])
def test_every_answer_of_a_chat_has_a_loss(tokenizer, template):
    tokenizer.chat_template = template
    chat = instructions(3, 4)[0]["messages"]
    row = encoded(tokenizer, {"messages": chat}, length=500, messages_column="messages")
    end = tokenizer.eos_token + "\n" if template is None else "<|end|>"
    assert with_loss(tokenizer, row) == "".join(
        f"{' ' if template is None else ''}{m['content']}{end}" for m in chat if m["role"] == "assistant"
    )
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(chat, tokenize=False)
    # What the model is asked in use, token by token, is what it was asked in training.
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt


def test_answers_that_a_template_writes_anew_are_texts_of_their_own(tokenizer):
    """As Qwen3's, which leaves out the thoughts of all answers but the last."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    args = finetune_causal_lm.DataArguments(sequence_length=500, messages_column="messages")
    said = (("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))
    chat = [{"role": role, "content": text} for role, text in said]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([{"messages": chat}]))
    made = completions.encode(data, tokenizer, args)["train"]
    assert [with_loss(tokenizer, row) for row in made] == ["<think>B.<|end|>", "<think>D.<|end|>"]
    whole = "<|user|>A?<|end|><|assistant|>B.<|end|><|user|>C?<|end|><|assistant|><think>D.<|end|>"
    assert tokenizer.decode(made[1]["input_ids"]) == whole


ALTERNATE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
BAD_CHATS = {
    "not a chat": ("text", None, "messages_column='messages' must hold lists of messages with 'role' and 'content'"),
    "assistant first": ([("assistant", "Hi")], CHATML, "messages_column='messages': a chat must begin with another than"),
    "template's own error": ([("system", "Hi"), ("assistant", "Hi")], ALTERNATE, "the chat template says no system role, of"),
    "answer before its question": (
        [("user", "Hi"), ("assistant", "Hi")], "{% for m in messages|reverse %}{{ m['content'] }}.{% endfor %}{{ bos_token }}",
        "does not begin with what it writes to ask for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHATS)
def test_chats_that_cannot_be_read_are_named(tokenizer, name):
    chat, tokenizer.chat_template, message = BAD_CHATS[name]
    if isinstance(chat, list):
        chat = [{"role": role, "content": content} for role, content in chat]
    with pytest.raises(ValueError, match=message):
        encoded(tokenizer, {"messages": chat}, messages_column="messages")


def test_prompts_go_through_the_tokenizer_s_chat_template(tokenizer):
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    row = {"prompt": "Why?", "completion": "So."}
    assert tokenizer.decode(encoded(tokenizer, row, **columns)["input_ids"]) == "Why?So.<|endoftext|>"
    tokenizer.chat_template = CHATML
    made = encoded(tokenizer, row, **columns)
    assert tokenizer.decode(made["input_ids"]) == "<|user|>Why?<|end|><|assistant|>So.<|end|>"
    assert with_loss(tokenizer, made) == "So.<|end|>"


def test_a_template_made_here_is_saved_with_the_tokenizer(tmp_path, files, model):
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    finetune_causal_lm.main([*model, *TRAINING, *files, *CHATS, *folders])
    for folder in ("out", "plain"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == completions.TEMPLATE


def test_rows_without_a_completion_are_left_out(tokenizer, caplog):
    args = finetune_causal_lm.DataArguments(sequence_length=8, prompt_column="p", completion_column="c")
    rows = [{"p": "a", "c": "b"}, {"p": "a" * 20, "c": "b"}, {"p": "a", "c": ""}, {"p": "", "c": "bcd"}]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    made = completions.encode(data, tokenizer, args)["train"]
    assert [with_loss(tokenizer, row) for row in made] == ["b<|endoftext|>", "cd<|endoftext|>"]  # nothing predicts a first token
    assert "2 of 4 rows of the train data are left out" in caplog.text


def test_batches_are_filled_up_without_a_loss():
    batch = completions.collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
