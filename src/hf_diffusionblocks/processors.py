"""Tokenizers as `convert` and the text recipe need them: there, or an error."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(source: str, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder; `hub` says where on the Hub, and how, to find it.

    Raises:
        OSError: there is none. (For several families AutoTokenizer then makes one without words, and says nothing.)
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except (ImportError, KeyError, OSError, ValueError) as error:  # each family has its own
        reason = " ".join(str(error).split()).partition(". ")[0]  # without advice on the hub
        raise OSError(f"{source} has no tokenizer that can be read: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(f"{source} has no tokenizer")
    return tokenizer
