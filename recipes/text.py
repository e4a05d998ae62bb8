"""What the recipes of text share: arguments and their checks, documents to sequences, tokenizers, what evaluation says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Trainer,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.processors import load_tokenizer
from hf_diffusionblocks.recipes import common, files
from hf_diffusionblocks.recipes.common import option

#: Ending of a file -> what `load_dataset` needs to read it. The documents of a text file are its paragraphs.
READERS = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
END = "<|endoftext|>"


@dataclass
class ModelArguments(common.ModelArguments):
    tokenizer_name: str | None = option(
        None,
        "Hub id or folder of the tokenizer. Default: the pretrained model's; for fresh weights, a byte-level BPE "
        "trained on the training text.",
    )
    vocab_size: int = option(4096, "Most tokens of the tokenizer that is trained; the model's vocabulary follows it.")


@dataclass
class DataArguments(common.DataArguments):
    """Which data: `dataset_name` or `train_file`."""

    train_file: str | None = option(
        None, "Text to train on: .parquet or .json(l) with a document a row, or .txt with paragraphs for documents."
    )
    validation_file: str | None = option(None, "Text to evaluate on, in any of these forms.")
    text_column: str = option("text", "Name of the column of text.")
    sequence_length: int = option(
        256, "Tokens of a training sequence: documents are joined, each closed by an end token, and cut to this length."
    )
    eval_nll_bound: int = option(
        0, "After training, estimate the diffusion's likelihood bound on that many sequences of the evaluation text."
    )


def check_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: db.DiffusionBlocksTrainingArguments
) -> None:
    """What of them is of text. Raises ValueError naming the field, its value and what is allowed."""
    check_sources(model_args, data_args)
    if data_args.sequence_length < 2:
        raise ValueError(f"sequence_length={data_args.sequence_length} must be at least 2")
    if data_args.eval_nll_bound < 0:
        raise ValueError(f"eval_nll_bound={data_args.eval_nll_bound} must be at least 0")
    if data_args.eval_nll_bound and training_args.train_blocks is not None:
        raise ValueError(f"eval_nll_bound={data_args.eval_nll_bound} needs all blocks: train_blocks must not be set")


def check_sources(model_args: ModelArguments, data_args: common.DataArguments) -> None:
    """What of them says where texts and tokens come from. Raises ValueError, too."""
    common.check_arguments(model_args, data_args)
    for name in ("train_file", "validation_file"):
        if (file := getattr(data_args, name)) and Path(file).suffix not in READERS:
            raise ValueError(f"{name}={file!r} must end in one of {', '.join(READERS)}")
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if model_args.vocab_size < smallest:
        raise ValueError(f"vocab_size={model_args.vocab_size} must be at least {smallest}: every byte, and {END}")
    overrides = [part.split("=")[0].strip() for part in (model_args.config_overrides or "").split(",")]
    if "vocab_size" in overrides:
        raise ValueError("config_overrides must not set vocab_size: it is the tokenizer's (see --vocab_size)")


def check_length(config: PreTrainedConfig, length: int, name: str = "sequence_length") -> None:
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise ValueError(f"{name}={length} must be at most the model's max_position_embeddings={longest}")


# ---- data


def load_data(args: DataArguments, seed: int) -> DatasetDict:
    """Splits "train" and, if there is anything to evaluate on, "validation", with the column of text."""
    # Neighbouring documents often belong together (paragraphs of one book), so they stay in order.
    data = common.load_data(args, ["text_column"], lambda: read_files(args), seed, ordered=True)
    check_texts(data, args.text_column)
    return data.select_columns(args.text_column)


def check_texts(data: DatasetDict, column: str) -> None:
    """Raises ValueError if a column holds anything else."""
    for split in data:
        kind = data[split].features[column]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"text_column={column!r} must hold text, in the {split} data it holds {kind}")


def read_files(args: DataArguments) -> DatasetDict:
    """The data sets of the files that are named, all their columns."""
    return files.read_files(args, lambda file: READERS[Path(file).suffix])


class Packer:
    """Documents to sequences of one length, with nothing lost but the end of the last document.

    A batch of documents, as `Dataset.map` gives it, ends within a sequence: what is left over begins the next one. So
    the batches must come in order, from one process. Each sequence also has `num_bytes`: the UTF-8 length of what its
    tokens spell, but those that are given and not predicted. A token spells the text from the end of the token before it
    to its own end; the end token what is left, usually nothing.

    Args:
        column: of the text.
        length: of a sequence, in tokens.
        num_given: tokens at its start that are not predicted: 1 where a token predicts the next.
    """

    features = Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")})

    def __init__(self, tokenizer: PreTrainedTokenizerBase, column: str, length: int, num_given: int):
        self.tokenizer, self.column, self.length, self.num_given = tokenizer, column, length, num_given
        self.end = end_token_id(tokenizer)
        self.tokens: list[int] = []
        self.bytes: list[int] = []  # of each token

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        texts = [text for text in rows[self.column] if text]
        if texts:
            # With special tokens: a document begins as a prompt does. Not verbose: its length needs no warning.
            encoded = self.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
            for text, tokens, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"]):
                self._add(text, tokens, offsets)
        whole = len(self.tokens) // self.length * self.length
        starts = range(0, whole, self.length)
        packed = {
            "input_ids": [self.tokens[start : start + self.length] for start in starts],
            "num_bytes": [sum(self.bytes[start + self.num_given : start + self.length]) for start in starts],
        }
        self.tokens, self.bytes = self.tokens[whole:], self.bytes[whole:]
        return packed

    def _add(self, text: str, tokens: list[int], offsets: list[tuple[int, int]]) -> None:
        if tokens[-1:] == [self.end]:  # the tokenizer's own may say that it ends where the text begins
            tokens, offsets = tokens[:-1], offsets[:-1]
        tokens, offsets = [*tokens, self.end], [*offsets, (len(text), len(text))]
        done = 0
        for token, (_, end) in zip(tokens, offsets):
            self.tokens.append(token)
            self.bytes.append(len(text[done:end].encode()))  # a character's second token adds nothing
            done = max(done, end)


def pack(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: DataArguments, num_given: int) -> DatasetDict:
    """Sequences of `input_ids`, and `num_bytes`, of every split; see [`Packer`]."""
    packed = DatasetDict()
    for split in data:
        packed[split] = data[split].map(
            Packer(tokenizer, args.text_column, args.sequence_length, num_given), batched=True,
            remove_columns=[args.text_column], features=Packer.features, desc=f"tokenize and pack ({split})",
        )  # fmt: skip
        if not len(packed[split]):
            raise ValueError(f"the {split} data has too little text for one sequence_length={args.sequence_length}")
    return packed


@dataclass
class EvaluationText:
    """What turns an evaluation's loss into perplexity and bits a byte.

    `num_tokens` are predicted, end tokens included, which cost nats and spell nothing. `num_bytes` is the length of what
    they spell. The likelihood bound is of the first `bound_sequences`, whose predicted tokens spell `bound_bytes`.
    """

    num_tokens: int
    num_bytes: int
    bound_sequences: int = 0
    bound_bytes: int = 0

    def measures(self, loss: float) -> dict[str, float]:
        return {
            "eval_perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond, floats end
            "eval_bits_per_byte": db.bits_per_byte(loss, self.num_tokens, self.num_bytes),
        }


def evaluation_text(data: Dataset, args: DataArguments, num_given: int) -> EvaluationText:
    """Of packed sequences."""
    num_bytes, bound = data["num_bytes"][:], min(args.eval_nll_bound, len(data))
    num_tokens = len(data) * (args.sequence_length - num_given)
    return EvaluationText(num_tokens, sum(num_bytes), bound, sum(num_bytes[:bound]))


# ---- tokenizer


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What closes a document: the end token, or BERT's separator."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def opened(prompt: str, tokenizer: PreTrainedTokenizerBase, with_special_tokens: bool) -> list[int]:
    """The tokens of a prompt, which goes on: without what a tokenizer closes texts with."""
    tokens = tokenizer(prompt, add_special_tokens=with_special_tokens)["input_ids"]
    return tokens[:-1] if with_special_tokens and tokens[-1:] == [end_token_id(tokenizer)] else tokens


def named_tokenizer(args: ModelArguments, resume_from: str | None, ends: Sequence[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is asked for, the pretrained model's, or that of the run that goes on; None: train one.

    `ends` are names of tokens that may close a document.
    """
    source = args.tokenizer_name or args.model_name_or_path or resume_from
    if source is None:
        return None
    tokenizer = load_tokenizer(source)
    if all(getattr(tokenizer, name) is None for name in ends):
        raise ValueError(f"the tokenizer of {source!r} must have an end token ({' or '.join(ends)})")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {source!r} must be a fast one: bytes are counted by its offsets")
    return tokenizer


def trained_tokenizer(texts: Iterable[str], args: ModelArguments, is_main: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained by the main process for all."""
    made = [None]
    if is_main:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab_size, special_tokens=[END], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator((text or "" for text in texts), trainer)
        made = [tokenizer.to_str()]
    (made,) = broadcast_object_list(made)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made), bos_token=END, eos_token=END, pad_token=END)


def fit_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> None:
    """Fresh weights have the tokenizer's vocabulary; pretrained ones must have room for it."""
    if not args.model_name_or_path:
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = None  # another vocabulary's may lie outside this one
    elif len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer_name={args.tokenizer_name!r} has {len(tokenizer)} tokens, but the model knows {config.vocab_size}"
        )
    # Llama does not train the embedding of its padding, and the end token is to be trained.
    if config.pad_token_id == tokenizer.eos_token_id:
        config.pad_token_id = None


# ---- evaluation


class TextTrainer(Trainer):
    """Adds to every evaluation what its loss amounts to; to the last one the likelihood bound, which takes long."""

    evaluation_text: EvaluationText

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "eval_loss" in logs:
            logs |= self.evaluation_text.measures(logs["eval_loss"])
            if self.evaluation_text.bound_sequences and not self.is_in_train:
                logs |= self._likelihood_bound(self.evaluation_text.bound_sequences)
        super().log(logs, *args, **kwargs)

    def _likelihood_bound(self, num_sequences: int) -> dict[str, float]:
        sequences = self.eval_dataset.select(range(num_sequences))
        loader = DataLoader(sequences, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        bound = db.nll_bound(self.model, loader, seed=self.args.seed)
        measures = {"": bound.nats_per_token, "_standard_error": bound.standard_error}
        size = bound.num_tokens, self.evaluation_text.bound_bytes
        in_bits = {f"_bits_per_byte{name}": db.bits_per_byte(nats, *size) for name, nats in measures.items()}
        return {f"eval_nll_bound{name}": value for name, value in (measures | in_bits).items()}


class BlocksTextTrainer(TextTrainer, db.DiffusionBlocksTrainer):
    """Trains the DiffusionBlocks model."""


# ---- from documents to a Trainer


class Format(NamedTuple):
    """How data becomes batches."""

    load: Callable[[DataArguments, int], DatasetDict]  #: arguments and seed -> columns of text
    encode: Callable[[DatasetDict, PreTrainedTokenizerBase, DataArguments], DatasetDict]  #: -> `input_ids`, `labels`
    collate: Callable[[list[dict]], dict[str, torch.Tensor]]
    evaluation_text: Callable[[Dataset, DataArguments], EvaluationText]  #: of the encoded validation data


def read(
    model_args: ModelArguments, data_args: DataArguments, training_args: db.DiffusionBlocksTrainingArguments,
    resume_from: str | None, data_format: Format, ends: Sequence[str] = ("eos_token",),
) -> tuple[DatasetDict, PreTrainedTokenizerBase]:  # fmt: skip
    """Columns of text, and the tokenizer, which is trained on them where none is named; `ends`: see [`named_tokenizer`]."""
    tokenizer = named_tokenizer(model_args, resume_from, ends)
    with training_args.main_process_first(local=False, desc="reading the data"):
        data = data_format.load(data_args, training_args.seed)
    if data_args.eval_nll_bound and "validation" not in data:
        raise ValueError(f"eval_nll_bound={data_args.eval_nll_bound} needs validation data")
    if tokenizer is None:
        texts = data["train"][data_args.text_column]
        tokenizer = trained_tokenizer(texts, model_args, training_args.process_index == 0)
    return data, tokenizer


def encode(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments,
    training_args: db.DiffusionBlocksTrainingArguments, data_format: Format,
) -> DatasetDict:  # fmt: skip
    """What [`read`] gives, as the format has it encoded; the main process does it first."""
    with training_args.main_process_first(local=False, desc="tokenizing the data"):
        return data_format.encode(data, tokenizer, data_args)


def make_trainer(
    trainer_class: type[TextTrainer], model: PreTrainedModel, data_args: DataArguments,
    training_args: db.DiffusionBlocksTrainingArguments, data: DatasetDict, data_format: Format,
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:  # fmt: skip
    """Of encoded data."""
    columns = [name for name in ("input_ids", "labels") if name in data["train"].column_names]
    trainer = common.make_trainer(
        trainer_class, model, data_args, training_args, data.select_columns(columns), data_format.collate,
        processing_class=tokenizer,
    )  # fmt: skip
    if "validation" in data:
        trainer.evaluation_text = data_format.evaluation_text(data["validation"], data_args)
    return trainer
