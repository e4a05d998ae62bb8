"""What benchmarks/finetune.py fine-tunes: a checkpoint trained end to end on one part of the data, and the other part."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import load_dataset
from gutenberg import END, config_for
from peft import LoraConfig
from quality_images import collate, load_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed,
)  # fmt: skip

from hf_diffusionblocks.models.causal_lm.task import plain_loss

PRETRAINING_AUTHORS = 20  # of 30, in the order of their names
FINETUNING_AUTHOR = "Swift, Jonathan"  # one of the others: another century and other matters
VOCAB, LENGTH = 4096, 128


class Task:
    """A checkpoint, what it is fine-tuned on, and how well that went."""

    measure: str  #: of `held_out`: the lower the better
    num_blocks: int
    num_layers: int
    layers: str  #: path of the plain model's layers
    batch_size: int
    updates = 250  #: of each parameter, in fine-tuning
    pretraining_rate: float
    pretraining_updates: int
    head: tuple[str, ...] = ()  #: modules that are new, and so trained whole in every method
    lora_targets: tuple[str, ...]
    plain_trainer: type[Trainer] = Trainer
    others: dict = {}  #: arguments of every trainer

    def arguments(self, output: Path, updates: int, learning_rate: float, **others) -> dict:
        """Of every Trainer here."""
        return {
            "output_dir": str(output), "per_device_train_batch_size": self.batch_size, "max_steps": updates,
            "learning_rate": learning_rate, "weight_decay": 0.01, "adam_beta2": 0.95, "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1, "seed": 0, "use_cpu": True, "report_to": [], "save_strategy": "no",
            "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, **self.others, **others,
        }  # fmt: skip

    def pretrain(self, model: PreTrainedModel, data, folder: Path) -> None:
        """End to end, with the stock Trainer."""
        args = TrainingArguments(**self.arguments(folder.parent, self.pretraining_updates, self.pretraining_rate))
        self.trainer(model, args, data).train()
        model.save_pretrained(folder)

    def trainer(self, model, args, data, **kwargs) -> Trainer:
        return self.plain_trainer(model=model, args=args, train_dataset=data, **kwargs)

    def lora(self) -> LoraConfig:
        return LoraConfig(r=16, lora_alpha=32, target_modules=list(self.lora_targets), modules_to_save=list(self.head) or None)

    def block_prefixes(self) -> list[list[str]]:
        """How the names of each block's parameters begin, in the plain model."""
        share = self.num_layers // self.num_blocks
        return [[f"{self.layers}.{layer}." for layer in range(k * share, (k + 1) * share)] for k in range(self.num_blocks)]

    def checkpoint(self) -> PreTrainedModel:
        raise NotImplementedError

    def held_out(self, model) -> float:
        raise NotImplementedError


class Sequences(torch.utils.data.Dataset):
    """A stream of tokens, cut."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class ChunkedTrainer(Trainer):
    """The stock Trainer, with the readout in chunks, as ours is; also of a model inside peft's."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        return plain_loss(plain, labels=inputs["input_ids"], input_ids=inputs["input_ids"])


class Novels(Task):
    """GPT-2 or Llama, trained on novels of 20 authors, fine-tuned on works of another."""

    measure = "held-out loss, nats a token"
    num_blocks, num_layers, batch_size = 4, 8, 8
    pretraining_rate, pretraining_updates = 3e-3, 3000
    plain_trainer = ChunkedTrainer

    def __init__(self, family: str, data: Path, output: Path):
        self.family, self.output = family, output
        self.layers = {"gpt2": "transformer.h", "llama": "model.layers"}[family]
        self.lora_targets = {
            "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
            "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        }[family]
        self.streams = self._tokens(data)
        self.train_set = Sequences(self.streams["train"])

    def _tokens(self, data: Path) -> dict[str, torch.Tensor]:
        """Streams of tokens: "pretraining"; "train" and "held out", different works of another author."""
        file = self.output / "tokens.pt"
        if file.is_file():
            return torch.load(file)
        rows = load_dataset("parquet", data_files=str(data / "gutenberg" / "train.parquet"), split="train").to_pandas()
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
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], show_progress=False, initial_alphabet=alphabet)
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
        streams["train"] = streams["train"][: self.updates * self.batch_size * LENGTH]
        torch.save(streams, file)
        return streams

    def checkpoint(self) -> PreTrainedModel:
        """The pretrained model."""
        folder = self.output / f"pretrained-{self.family}"
        if not folder.is_dir():
            set_seed(0)
            config = config_for(self.family, self.num_layers, 128, VOCAB, LENGTH)
            self.pretrain(AutoModelForCausalLM.from_config(config), Sequences(self.streams["pretraining"]), folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    @torch.no_grad()
    def held_out(self, model) -> float:
        """Nats a token of the whole model."""
        rows = Sequences(self.streams["held out"]).tokens
        total = sum(
            F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            for batch in rows.split(self.batch_size)
        )
        return total / rows[:, 1:].numel()


class Clothes(Task):
    """A ViT trained on five classes of Fashion-MNIST, fine-tuned with a new head on the other five."""

    measure = "test error, %"
    num_blocks, num_layers, batch_size = 3, 6, 32
    layers = "vit.layers"
    pretraining_rate, pretraining_updates = 1e-3, 1500
    head = ("classifier",)
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    others = {"remove_unused_columns": False}

    def __init__(self, data: Path, output: Path):
        self.output, folder = output, data / "fashion_mnist"
        train, test = (load_split(folder, split) for split in ("train", "test"))
        self.known = torch.utils.data.TensorDataset(*_of(train, range(5)))
        images, labels = _of(train, range(5, 10))
        size = self.updates * self.batch_size
        self.train_set = torch.utils.data.TensorDataset(images[:size], labels[:size] - 5)
        self.test = _of(test, range(5, 10))

    def trainer(self, model, args, data, **kwargs) -> Trainer:
        return super().trainer(model, args, data, data_collator=collate, **kwargs)

    def checkpoint(self) -> PreTrainedModel:
        """The pretrained model, with a new head."""
        folder = self.output / "pretrained-vit"
        if not folder.is_dir():
            set_seed(0)
            config = ViTConfig(
                num_hidden_layers=self.num_layers, hidden_size=64, intermediate_size=256, num_attention_heads=4,
                image_size=28, patch_size=4, num_channels=1, num_labels=5,
            )  # fmt: skip
            self.pretrain(ViTForImageClassification(config), self.known, folder)
        model = ViTForImageClassification.from_pretrained(folder)
        set_seed(0)
        model.classifier.reset_parameters()
        return model

    @torch.no_grad()
    def held_out(self, model) -> float:
        """Errors of the whole model, in %."""
        images, labels = self.test
        wrong = sum(
            (model(pixel_values=batch).logits.argmax(-1) != truth).sum().item()
            for batch, truth in zip(images.split(500), (labels - 5).split(500))
        )
        return 100 * wrong / len(labels)


def _of(split: tuple[torch.Tensor, torch.Tensor], classes: range) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = split
    chosen = (labels >= classes[0]) & (labels <= classes[-1])
    return images[chosen], labels[chosen]
