"""The recipe of text classification, as users run it: fresh and pretrained, whole and block by block."""

from __future__ import annotations

import json
import random

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes import train_text_classification

WORDS = {"sea": "ship sail wave salt harbour", "wood": "oak leaf moss fern path", "town": "street lamp shop coach square"}
FRESH = [
    "--config_overrides", "hidden_size=32,num_hidden_layers=4,num_attention_heads=2,intermediate_size=48",
    "--vocab_size", "300", "--max_length", "24",
]  # fmt: skip
BERT = ["--config_name", "bert", *FRESH]
LLAMA = ["--config_name", "llama", *FRESH[:1], FRESH[1] + ",num_key_value_heads=2", *FRESH[2:]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSON lines file: what a text is about follows from its words."""
    draw, rows = random.Random(0), []
    for label in sorted(WORDS) * 20:
        rows.append({"text": " ".join(draw.choices(WORDS[label].split(), k=draw.randint(3, 8))), "label": label})
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(data, output_dir, *options) -> dict[str, float]:
    return train_text_classification.main([
        "--train_file", str(data), "--validation_file", str(data), "--updates_per_block", "60", "--learning_rate", "0.005",
        "--per_device_train_batch_size", "16", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True",
        "--save_strategy", "no", "--output_dir", str(output_dir), *options,
    ])  # fmt: skip


@pytest.mark.parametrize("model", [BERT, LLAMA], ids=["bert", "llama"])
def test_blocks_of_a_fresh_model_learn_and_a_pipeline_takes_them(model, data, tmp_path):
    metrics = run(data, tmp_path, *model, "--num_blocks", "2")
    assert metrics["eval_accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(model, db.DiffusionBlocksForSequenceClassification) and model.num_blocks == 2
    classify = pipeline("text-classification", model=str(tmp_path))
    assert [found["label"] for found in classify(["oak moss fern leaf", "ship salt wave"])] == ["wood", "sea"]


def test_a_stock_model_goes_on_block_by_block_on_its_own_labels(data, tmp_path):
    run(data, tmp_path / "plain", *BERT, "--end_to_end")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    metrics = run(data, tmp_path / "cut", "--model_name_or_path", str(tmp_path / "plain"), "--updates_per_block", "1")
    cut = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut")
    assert metrics["eval_accuracy"] > 0.9 and type(cut.to_plain()) is type(plain)
    assert cut.config.id2label == plain.config.id2label == {0: "sea", 1: "town", 2: "wood"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "cut")) == plain.config.vocab_size
