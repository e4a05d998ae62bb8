"""How the text recipes make tokens of text: a tokenizer of their own, packing, and counts of bytes."""

from __future__ import annotations

import copy
import math

import datasets
import pytest
import torch
from recipe_runs import LENGTH, paragraphs, sequences, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_diffusionblocks.recipes import train_causal_lm
from hf_diffusionblocks.recipes.text import EvaluationText, Packer


def test_trained_tokenizer_spells_everything_and_reloads(tmp_path, tokenizer):
    assert len(tokenizer) == 300
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The yield statement", " two  spaces\n\ttab", "na\u00efve \u03c0 \U0001f600 \u4f60", "<|endoftext|>"):
        tokens = tokenizer(text)["input_ids"]
        assert reloaded(text)["input_ids"] == tokens
        assert reloaded.decode(tokens) == text
    assert reloaded("<|endoftext|>")["input_ids"] == [reloaded.eos_token_id] == [0]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_packing_loses_no_token_and_counts_every_byte(tokenizer, batch_size):
    texts = [*paragraphs(0, 40), "", None, "\U0001f600\U0001f600 \u4f60\u597d" * 9, *paragraphs(40, 50)]
    rows = datasets.Dataset.from_dict({"text": texts})
    packer = Packer(tokenizer, "text", LENGTH, num_given=1)
    packed = rows.map(packer, batched=True, batch_size=batch_size, remove_columns=["text"], features=packer.features)
    expected = sequences(tokenizer, [text for text in texts if text])
    assert torch.equal(torch.tensor(packed["input_ids"]), expected)

    # Against another count: each character of a token of a byte-level BPE stands for a byte.
    spelled = [sum(len(tokenizer.convert_ids_to_tokens(int(t))) * (t != 0) for t in row[1:]) for row in expected]
    assert sum(packed["num_bytes"]) == pytest.approx(sum(spelled), abs=3 * len(spelled))  # cut characters
    ascii_only = [i for i, row in enumerate(expected) if tokenizer.decode(row).isascii()]
    assert len(ascii_only) > 100 and all(packed["num_bytes"][i] == spelled[i] for i in ascii_only)


def test_bytes_of_all_tokens_are_those_of_the_text(tokenizer):
    packer = Packer(tokenizer, "text", 10**6, num_given=1)
    texts = [*paragraphs(0, 30), "\U0001f600 \u4f60\u597d", " ends in space  "]
    packer({"text": texts})
    assert sum(packer.bytes) == sum(len(text.encode()) for text in texts)
    assert len(packer.bytes) == len(packer.tokens)


def test_special_tokens_of_a_tokenizer_are_kept_and_not_doubled(tokenizer):
    rules = copy.deepcopy(tokenizer.backend_tokenizer)
    rules.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 1)])  # as Llama's begins a text
    packer = Packer(PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<|endoftext|>"), "text", 10**6, num_given=1)
    packer({"text": ["yield<|endoftext|>", "yield"]})
    yields = tokenizer("yield")["input_ids"]
    assert packer.tokens == [1, *yields, 0, 1, *yields, 0]
    assert packer.bytes[0] == 0 and sum(packer.bytes) == len("yield<|endoftext|>yield")


def test_end_tokens_are_labels_and_first_tokens_are_none():
    batch = train_causal_lm.collate([{"input_ids": [5, 0, 7]}])
    assert batch["input_ids"].tolist() == [[5, 0, 7]]
    assert batch["labels"].tolist() == [[-100, 0, 7]]


def test_infinite_perplexity_is_no_error():
    text = EvaluationText(num_tokens=10, num_bytes=20)
    assert text.measures(1e4)["eval_perplexity"] == math.inf
    assert text.measures(2 * math.log(2))["eval_bits_per_byte"] == pytest.approx(1.0)
