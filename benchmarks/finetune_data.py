"""What benchmarks/finetune.py starts from: text of some authors and of another, and a model trained on the former."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import load_dataset
from gutenberg import END, config_for, plain_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

VOCAB, LENGTH, BATCH, LAYERS, WIDTH = 4096, 128, 8, 8, 128
PRETRAINING_UPDATES, UPDATES = 3000, 250
PRETRAINING_AUTHORS = 20  # of 30, in the order of their names
FINETUNING_AUTHOR = "Swift, Jonathan"  # one of the others: another century and other matters


class Sequences(torch.utils.data.Dataset):
    """A stream of tokens, cut."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class ChunkedTrainer(Trainer):
    """The stock Trainer, with the readout in chunks, as ours is."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return plain_loss(model, inputs["input_ids"]) if model.training else super().compute_loss(model, inputs, *args, **kwargs)


def tokens(data: Path, output: Path) -> dict[str, torch.Tensor]:
    """Streams of tokens: "pretraining"; "train" and "held out", different works of another author."""
    file = output / "tokens.pt"
    if file.is_file():
        return torch.load(file)
    rows = load_dataset("parquet", data_files=str(data / "train.parquet"), split="train").to_pandas()
    works = rows.groupby(["author", "title"], sort=True)["text"].agg("\n\n".join)
    authors = sorted(rows["author"].unique())
    *others, last = works[FINETUNING_AUTHOR]
    texts = {  # works in the order of their titles
        "pretraining": [text[:400_000] for author in authors[:PRETRAINING_AUTHORS] for text in works[author][:3]],
        "train": others,
        "held out": [last[:400_000]],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts["pretraining"], trainer)
    streams = {
        name: torch.tensor([token for e in tokenizer.encode_batch(documents) for token in [0, *e.ids]])
        for name, documents in texts.items()
    }
    # Rows in random order, once for all: every method meets the same
    generator = torch.Generator().manual_seed(0)
    for name in ("pretraining", "train"):
        cut = Sequences(streams[name]).tokens
        streams[name] = cut[torch.randperm(len(cut), generator=generator)].flatten()
    streams["train"] = streams["train"][: UPDATES * BATCH * LENGTH]
    torch.save(streams, file)
    return streams


def arguments(output: Path, updates: int, learning_rate: float, **others) -> dict:
    """Of every Trainer here."""
    return {
        "output_dir": str(output), "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "max_steps": updates, "learning_rate": learning_rate, "weight_decay": 0.01, "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "seed": 0, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, **others,
    }  # fmt: skip


def pretrained(family: str, streams: dict[str, torch.Tensor], output: Path) -> PreTrainedModel:
    """The checkpoint, trained once."""
    folder = output / f"pretrained-{family}"
    if not folder.is_dir():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config_for(family, LAYERS, WIDTH, VOCAB, LENGTH))
        args = TrainingArguments(**arguments(output, PRETRAINING_UPDATES, 3e-3))
        ChunkedTrainer(model=model, args=args, train_dataset=Sequences(streams["pretraining"])).train()
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)
