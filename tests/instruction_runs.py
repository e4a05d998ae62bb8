"""What fine-tuning of text runs on: instructions in all forms, a stock GPT-2 and its tokenizer, and a slow cross-entropy."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from hf_diffusionblocks.recipes import train_causal_lm

LENGTH = 64
TRAINING = [
    "--num_blocks", "2", "--updates_per_block", "3", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2",
    "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip
PROMPTS = ["--prompt_column", "prompt", "--completion_column", "completion"]
CHATS = ["--messages_column", "messages"]


def instructions(start: int, end: int) -> list[dict]:
    """Rows that are texts, prompts with completions, and chats; completions of very different lengths."""
    rows = []
    for number, (name, text) in list(enumerate(topics.items()))[start:end]:
        answer = text.strip()[: 10 + 9 * (number % 4)]
        chat = [("user", f"{name}?"), ("assistant", answer[:8]), ("user", "More"), ("assistant", answer[8:])]
        rows.append({
            "text": text[:300], "prompt": f"{name}: ", "completion": answer,
            "messages": [{"role": role, "content": content} for role, content in chat],
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("instructions")
    for name, rows in (("train", instructions(0, 40)), ("test", instructions(40, 61))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "test.jsonl")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, files) -> Path:
    """A stock GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    fresh = ["--config_name", "gpt2", "--config_overrides", f"n_layer=2, n_embd=32, n_head=2, n_positions={LENGTH}"]
    run = [*TRAINING, *files, *fresh, "--end_to_end", "--vocab_size", "300", "--sequence_length", str(LENGTH)]
    train_causal_lm.main([*run, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def model(plain) -> list[str]:
    return ["--model_name_or_path", str(plain), "--sequence_length", str(LENGTH)]


@pytest.fixture
def tokenizer(plain):
    return AutoTokenizer.from_pretrained(plain)


def cross_entropy(model, rows: list[tuple[list[int], list[int]]]) -> float:
    """Nats a labelled token, a row at a time."""
    total, count = 0.0, 0
    for tokens, labels in rows:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([tokens])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum").item()
        count += sum(label != -100 for label in labels[1:])
    return total / count


def prompt_rows(tokenizer, start: int, end: int) -> list[tuple[list[int], list[int]]]:
    """What the recipe has to make of prompts and completions."""
    rows = []
    for row in instructions(start, end):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        rows.append(([*prompt, *completion][:LENGTH], [*[-100] * len(prompt), *completion][:LENGTH]))
    return rows
