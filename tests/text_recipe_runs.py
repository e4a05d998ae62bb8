"""What the text recipes run on: files of prose, tiny models, a tokenizer, and what packing has to make of them."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_diffusionblocks.recipes.text import ModelArguments, trained_tokenizer

LENGTH = 24
OVERRIDES = {
    "gpt2": "n_layer=2, n_embd=32, n_head=2, n_positions=24",
    "llama": "num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, "
    "intermediate_size=48, max_position_embeddings=24",
    "qwen3": "num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, "
    "intermediate_size=48, max_position_embeddings=24",
}
SIZES = ["--num_blocks", "2", "--vocab_size", "300", "--sequence_length", str(LENGTH)]
MODEL = [*SIZES, "--config_name", "gpt2", "--config_overrides", OVERRIDES["gpt2"]]
TRAINING = [
    "--updates_per_block", "4", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2",
    "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip


def paragraphs(start: int, end: int) -> list[str]:
    """English prose, with a few characters of several bytes."""
    text = "".join(f"{name} \N{EM DASH} \N{GREEK SMALL LETTER PI}\n\n{topic}\n\n" for name, topic in topics.items())
    return [part for part in text.split("\n\n") if part][start:end]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, rows in (("train", paragraphs(0, 120)), ("test", paragraphs(120, 150))):
        (folder / f"{name}.txt").write_text("\n\n".join(rows))
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}), folder / f"{name}.parquet")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture
def data(folder) -> list[str]:
    return files(folder, "parquet")


def files(folder: Path, ending: str) -> list[str]:
    return ["--train_file", str(folder / f"train.{ending}"), "--validation_file", str(folder / f"test.{ending}")]


def sequences(tokenizer, texts: list[str]) -> torch.Tensor:
    """What packing has to give."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    args = ModelArguments(vocab_size=300)
    return trained_tokenizer([*paragraphs(0, 120), None], args, is_main=True)
