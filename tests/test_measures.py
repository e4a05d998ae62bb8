"""Measures of generated text, against counts and probabilities worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    BertConfig, BertForMaskedLM, BertForSequenceClassification, BertLMHeadModel, BertModel, GPT2Config, GPT2LMHeadModel,
    PreTrainedTokenizerFast, T5Config, T5Model,
)  # fmt: skip

import hf_diffusionblocks as db

WORDS = ["<s>", "?", *"abcdefgh"]
DIVERSITY = ("distinct_1", "distinct_2", "distinct_3", "entropy", "repetition_rate")


SMALL = GPT2LMHeadModel(GPT2Config(vocab_size=3, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))


def make_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>")


@pytest.fixture
def judge() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def nats(judge, tokenizer, context: str, text: str) -> torch.Tensor:
    """-ln p of each token of a text, one row alone, no padding."""
    before, tokens = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (context, text))
    with torch.no_grad():
        log_probabilities = judge(torch.tensor([before + tokens])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return -log_probabilities.gather(1, torch.tensor(tokens)[:, None])[:, 0]


# ---- diversity


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["a a a a a a"], [1 / 6, 1 / 5, 1 / 4, 0, 2 / 3]),
        (["a b c d e f"], [1, 1, 1, math.log(6), 0]),
        (
            ["a b c a", "a b d"],
            [4 / 7, 4 / 5, 3 / 3, 3 / 7 * math.log(7 / 3) + 2 / 7 * math.log(7 / 2) + 2 / 7 * math.log(7), 0],
        ),
        # Five 4-grams in each: abcd comes back once in the first, and the second's are its own.
        (["a b c d a b c d", "a b c d e f g h"], [8 / 16, 8 / 14, 8 / 12, 1.948629505738699, 1 / 10]),
        (["a b"], [1, 1, math.nan, math.log(2), math.nan]),  # no share of what is longer
    ],
)
def test_diversity_is_that_of_counts(tokenizer, texts, expected):
    """Over the whole set, and within texts: no n-gram spans two."""
    found = db.generation_measures(texts, tokenizer)
    assert found == pytest.approx(dict(zip(DIVERSITY, expected)), nan_ok=True)


def test_an_empty_text_counts_for_nothing(tokenizer, judge):
    texts, prompts = ["a b c d e", "b b c d e"], ["f", "g"]
    expected = db.generation_measures(texts, tokenizer, judge, prompts)
    assert db.generation_measures([*texts, ""], tokenizer, judge, [*prompts, "h"]) == pytest.approx(expected)


# ---- generative perplexity


def test_perplexity_is_of_the_continuations_given_their_prompts(tokenizer, judge):
    """Over all tokens alike, whichever text they are of, and none of the prompts'."""
    texts, prompts = ["c d e f", "a"], ["a b", "g g g"]
    scored = torch.cat([nats(judge, tokenizer, f"<s> {prompt}", text) for prompt, text in zip(prompts, texts)])
    measures = db.generation_measures(texts, tokenizer, judge, prompts)
    assert measures["generative_perplexity"] == pytest.approx(scored.mean().exp().item(), rel=1e-5)
    assert {*measures} == {"generative_perplexity", *DIVERSITY}


def test_without_a_beginning_token_the_first_token_is_not_scored(judge):
    tokenizer = make_tokenizer()
    expected = nats(judge, tokenizer, "c", "d e").mean().exp().item()
    assert db.generation_measures(["c d e"], tokenizer, judge)["generative_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_padding_is_never_counted(tokenizer, judge):
    texts, prompts = ["c d e f g h a b", "a", "b c", "h"], ["a b", "g", "a b c d e", ""]
    alone, together = (
        db.generation_measures(texts, tokenizer, judge, prompts, batch_size=size)["generative_perplexity"] for size in (1, 4)
    )
    assert together == pytest.approx(alone, rel=1e-5)


def test_judge_reads_without_dropout_and_keeps_its_mode(tokenizer, judge):
    first, second = (db.generation_measures(["a b c"], tokenizer, judge.train()) for _ in range(2))
    assert first == second and judge.training


def test_a_diffusion_blocks_model_can_be_the_judge(tokenizer, judge):
    own = db.convert(judge, num_blocks=2)
    by_own, by_plain = (db.generation_measures(["a b c d", "e"], tokenizer, reader) for reader in (own, judge))
    assert by_own == pytest.approx(by_plain, rel=1e-6)


def test_bfloat16_judge_s_logits_are_summed_up_in_float32(tokenizer, judge):
    with torch.no_grad():
        logits = judge.bfloat16()(torch.tensor([[0, 2, 3]])).logits[0, :2]
    expected = F.cross_entropy(logits.float(), torch.tensor([2, 3])).exp().item()
    assert db.generation_measures(["a b"], tokenizer, judge)["generative_perplexity"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("judge_class", [BertForMaskedLM, BertLMHeadModel, BertForSequenceClassification, BertModel, T5Model])
def test_a_judge_that_sees_what_it_scores_is_refused(tokenizer, judge_class):
    """By what it does: `BertLMHeadModel` is a causal model for the library, and looks both ways where its config says nothing."""
    if judge_class is T5Model:
        config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(WORDS))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(WORDS), **sizes)
    with pytest.raises(TypeError, match=f"judge={judge_class.__name__} must be a causal language model"):
        db.generation_measures(["a b c"], tokenizer, judge_class(config))


# ---- bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"texts": "a b"}, TypeError, r"texts='a b' must be a list of strings"),
        ({"texts": [], "prompts": None}, ValueError, r"none of the 0 has a token"),
        ({"texts": ["", ""], "prompts": None}, ValueError, r"none of the 2 has a token"),
        ({"prompts": "a"}, TypeError, r"prompts='a' must be a list of strings"),
        ({"prompts": ["a", "b"]}, ValueError, r"2 prompts must be as many as the 1 texts"),
        ({"tokenizer": None}, TypeError, r"tokenizer=NoneType must be a tokenizer"),
        ({"batch_size": 0}, ValueError, r"batch_size=0 must be a whole number from 1"),
        ({"texts": [["a", "b"]], "prompts": None}, TypeError, r"texts\[0\] is a list, and must be a string"),
        ({"judge": SMALL}, ValueError, r"texts\[0\] has token 4, and the judge knows 3 tokens"),
        ({"judge": "gpt2"}, TypeError, r"judge=str must be a causal language model"),
        ({"texts": ["a " * 12]}, ValueError, r"texts\[0\] and its prompt have 14 tokens: the judge reads at most 12"),
        ({"texts": ["a"], "prompts": None, "tokenizer": make_tokenizer()}, ValueError, r"nothing to score"),
    ],
)
def test_bad_input_is_named(tokenizer, judge, change, error, message):
    arguments = {"texts": ["a b"], "tokenizer": tokenizer, "judge": judge, "prompts": ["c"], **change}
    with pytest.raises(error, match=message):
        db.generation_measures(**arguments)
