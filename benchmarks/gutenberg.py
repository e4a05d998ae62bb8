"""Tokenized Gutenberg text, and tiny configs, for the text benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

END = "<|endoftext|>"


def prepare(folder: Path, output: Path, vocab_size: int, train_bytes: int, eval_bytes: int) -> Path:
    """Train a byte-level BPE and tokenize: a file of the tensors "train", "validation" and "bytes_per_token"."""
    file = output / f"tokens-{vocab_size}-{train_bytes}.pt"
    if file.is_file():
        return file
    texts = {
        split: works(folder / f"{split}.parquet", size) for split, size in (("train", train_bytes), ("validation", eval_bytes))
    }
    tokenizer = byte_pairs(texts["train"], vocab_size)
    end = tokenizer.token_to_id(END)
    tokens = {
        split: torch.tensor([token for e in tokenizer.encode_batch(documents) for token in [end, *e.ids]])
        for split, documents in texts.items()
    }
    size = sum(len(text.encode()) for text in texts["validation"])
    tokenizer.save(str(output / f"tokenizer-{vocab_size}.json"))
    torch.save({**tokens, "bytes_per_token": size / len(tokens["validation"])}, file)
    return file


def byte_pairs(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE, trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def works(path: Path, size: int) -> list[str]:
    """Whole works in random order, paragraphs joined, up to about this many bytes."""
    rows = load_dataset("parquet", data_files=str(path), split="train").to_pandas()
    works = [text for _, text in rows.groupby("title")["text"].agg("\n\n".join).items()]
    chosen, total = [], 0
    for index in np.random.default_rng(0).permutation(len(works)):
        chosen.append(works[index][: size // 8])  # no work is more than an eighth
        total += len(chosen[-1].encode())
        if total > size:
            break
    return chosen


def config_for(family: str, layers: int, width: int, vocab_size: int, length: int, head_size: int = 32) -> PreTrainedConfig:
    """A GPT-2 or Llama without dropout."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2Config(
            n_layer=layers, n_embd=width, n_head=width // head_size, vocab_size=vocab_size, n_positions=length,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **ends,
        )  # fmt: skip
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=width * 8 // 3,
        num_attention_heads=width // head_size, vocab_size=vocab_size, max_position_embeddings=length, **ends,
    )  # fmt: skip
