"""Text as text8 has it: 26 letters and the space, made from novels of Project Gutenberg."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import torch
from gutenberg import works
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def characters(folder: Path, output: Path, train_bytes: int = 30_000_000, eval_bytes: int = 2_000_000) -> Path:
    """A file of the tensors "train" and "validation": characters of whole works, as numbers in [`ALPHABET`] (uint8)."""
    file = output / f"characters-{train_bytes}.pt"
    if not file.is_file():
        sizes = {"train": train_bytes, "validation": eval_bytes}
        torch.save({split: encode(works(folder / f"{split}.parquet", size)) for split, size in sizes.items()}, file)
    return file


def encode(texts: list[str]) -> torch.Tensor:
    """Lower case; accents are dropped, and what is no letter is a space, of which there are never two in a row."""
    joined = unicodedata.normalize("NFKD", "\n".join(texts)).encode("ascii", "ignore").decode().lower()
    spaced = re.sub("[^a-z]+", " ", joined).encode()
    return torch.clamp(torch.frombuffer(bytearray(spaced), dtype=torch.uint8).int() - ord("a") + 1, min=0).byte()


def decode(numbers: torch.Tensor) -> str:
    """`[S]` -> text; a number beyond the alphabet is a mask, `_`."""
    return "".join((ALPHABET + "_")[k] for k in numbers.tolist())


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character of [`ALPHABET`], without special ones."""
    of_characters = Tokenizer(models.WordLevel({character: number for number, character in enumerate(ALPHABET)}))
    of_characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=of_characters)
