"""What generated text is worth: how likely a judge finds it, and, never without that, how varied it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..backbones.stock_run import without_dropout
from ..whole_numbers import whole

REPEATED_LENGTH = 4  # tokens of the n-grams whose repetition is counted


def generation_measures(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    judge: PreTrainedModel | None = None,
    prompts: Sequence[str] | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Measure generated texts. A model that repeats itself is likely to its judge: read the perplexity with the rest.

    Tokens are the judge's, of each text by itself, without special tokens. A text of none (generation ended at once)
    counts for nothing. A share is nan where no text is long enough for one n-gram.

    Args:
        texts: continuations, without their prompts.
        tokenizer: the judge's.
        judge: a causal language model; None measures diversity alone.
        prompts: what the texts continue, one each: the judge reads them, and does not score them.
        batch_size: texts that the judge reads at a time.

    Returns:
        - `generative_perplexity` (with a judge): exp of the mean nats per token, over the tokens of all texts. Each is
          predicted from the tokenizer's beginning-of-sequence token (if it has one), the prompt, and the text before.
          Where there is neither, a text's first token is predicted from nothing and not scored.
        - `distinct_1`, `distinct_2`, `distinct_3`: different n-grams over all n-grams, of all texts together; 0 to 1.
        - `entropy`: of the relative frequencies of all tokens, in nats; 0 to ln of the vocabulary's size.
        - `repetition_rate`: the share of 4-grams that occurred before in the same text, of those of all texts; 0 to 1.

    Raises:
        TypeError: texts or prompts are no strings, or one; the tokenizer is none, or the judge no causal language model: one
            that sees the token it scores has no perplexity.
        ValueError: there is nothing to measure or to score, texts and prompts differ in number, or a text is longer
            than the judge can read, or has tokens that it does not know.
    """
    _check(texts, tokenizer, judge, prompts)
    batch_size = whole("batch_size", batch_size, 1)
    tokens = _tokens_of(texts, tokenizer)
    if not any(tokens):
        raise ValueError(f"texts: none of the {len(texts)} has a token, there is nothing to measure")
    measures = {}
    if judge is not None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        contexts = [start + prompt for prompt in _tokens_of(prompts or [""] * len(texts), tokenizer)]
        measures["generative_perplexity"] = _perplexity(judge, contexts, tokens, batch_size)
    return measures | _diversity(tokens)


def _check(texts, tokenizer, judge, prompts) -> None:
    for name, strings in (("texts", texts), ("prompts", prompts)):
        if isinstance(strings, str):
            raise TypeError(f"{name}={strings[:20]!r} must be a list of strings, not one")
        for index, string in enumerate(strings or ()):
            if not isinstance(string, str):
                raise TypeError(f"{name}[{index}] is a {type(string).__name__}, and must be a string")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer={type(tokenizer).__name__} must be a tokenizer of transformers")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts must be as many as the {len(texts)} texts that continue them")
    if judge is not None and getattr(getattr(judge, "config", None), "is_encoder_decoder", True):
        raise _no_causal_model(judge)


def _no_causal_model(judge) -> TypeError:
    return TypeError(
        f"judge={type(judge).__name__} must be a causal language model of transformers, which sees no token that comes after: "
        "load one with AutoModelForCausalLM"
    )


def _tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


@torch.no_grad()
def _perplexity(judge: PreTrainedModel, contexts: list[list[int]], tokens: list[list[int]], batch_size: int) -> float:
    config = judge.config.get_text_config()
    longest, known = (getattr(config, name, math.inf) for name in ("max_position_embeddings", "vocab_size"))
    for index, (context, text) in enumerate(zip(contexts, tokens)):
        if len(context) + len(text) > longest:
            raise ValueError(
                f"texts[{index}] and its prompt have {len(context) + len(text)} tokens: the judge reads at most {longest}"
            )
        if (most := max(context + text, default=0)) >= known:
            raise ValueError(f"texts[{index}] has token {most}, and the judge knows {known} tokens: is the tokenizer its own?")
    nats, scored = 0.0, 0
    pairs = list(zip(contexts, tokens))
    with without_dropout(judge):
        _check_causal(judge, max((context + text for context, text in pairs), key=len))
        for start in range(0, len(pairs), batch_size):
            losses = _nats(judge, pairs[start : start + batch_size])
            nats, scored = nats + losses.double().sum().item(), scored + len(losses)
    if not scored:
        raise ValueError("texts: no token has one before it, there is nothing to score")
    return math.exp(nats / scored)


def _check_causal(judge: PreTrainedModel, row: list[int]) -> None:
    """By what it does, on a text with two endings: classes do not tell (BERT's `BertLMHeadModel` looks both ways)."""
    if len(row) < 2:
        return
    other_end = [*row[:-1], row[-1] - 1 if row[-1] else 1]
    logits = judge(input_ids=torch.tensor([row, other_end], device=judge.device)).get("logits")
    if logits is None or logits.shape[:2] != (2, len(row)):
        raise _no_causal_model(judge)
    one, other = logits[:, :-1].float()
    differences = torch.where(one == other, 0, one - other).abs()  # (-inf is equal to itself)
    if differences.max() > max(1e-5, 8 * torch.finfo(logits.dtype).eps) * one[one.isfinite()].abs().max():
        raise _no_causal_model(judge)


def _nats(judge: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """`-ln p` of each token that is scored, of these texts in their contexts."""
    pairs = [(context, text) for context, text in pairs if text]
    if not pairs:
        return torch.zeros(0)
    rows = [torch.tensor(context + text) for context, text in pairs]
    attended = [torch.ones_like(row) for row in rows]
    scored = [torch.arange(len(row)) >= len(context) for row, (context, _) in zip(rows, pairs)]
    # (Any token will do as padding: it stands after all that is scored.)
    input_ids, attention_mask, scored = (
        pad_sequence(each, batch_first=True).to(judge.device) for each in (rows, attended, scored)
    )
    logits = judge(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    scored = scored[:, 1:]
    return F.cross_entropy(logits[scored].float(), input_ids[:, 1:][scored], reduction="none")


def _diversity(tokens: list[list[int]]) -> dict[str, float]:
    measures = {}
    for length in (1, 2, 3):
        counts = Counter(gram for text in tokens for gram in _grams(text, length))
        measures[f"distinct_{length}"] = _share(len(counts), counts.total())
    counts = Counter(token for text in tokens for token in text)
    shares = [count / counts.total() for count in counts.values()]
    measures["entropy"] = sum(-share * math.log(share) for share in shares)
    grams = [_grams(text, REPEATED_LENGTH) for text in tokens]
    repeated = sum(len(of_text) - len(set(of_text)) for of_text in grams)
    measures["repetition_rate"] = _share(repeated, sum(map(len, grams)))
    return measures


def _grams(tokens: list[int], length: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(length))))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
