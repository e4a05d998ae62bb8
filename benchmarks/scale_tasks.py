"""What scale.py trains: causal text, masked text and images, each with the rows at the top of the ladder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from generation_metrics import held_out_errors
from gutenberg import config_for
from quality_generation import SIGMA_DATA, collate
from quality_masked import bits_by_quarter
from quality_text import ChunkedTrainer, Sequences
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig


@dataclass(frozen=True)
class Row:
    """A way to train.

    Args:
        fields: what `convert` is given; None is a plain model, and the stock Trainer.
        depth: layers in all, over those of the end-to-end model.
        arguments: of the Trainer.
        equal_seconds: trained for as many seconds as the slowest row of blocks, instead of for as many updates.
    """

    fields: dict | None = None
    depth: float = 1.0
    arguments: dict = field(default_factory=dict)
    equal_seconds: bool = False


@dataclass(frozen=True)
class Size:
    """Of a model and its training; the length is that of a text in tokens, and 1 of an image."""

    layers: int
    width: int
    head_size: int
    length: int
    batch_size: int
    learning_rate: float
    held_out: int


class Task:
    """A task at the size of a device.

    Args:
        data: of scale_data.py.
        device: "cuda" or "cpu".
    """

    name: str
    unit: str
    share: float  #: of the time
    sizes: dict[str, Size]
    rows: dict[str, Row]  #: the first one is end to end
    collator = None

    def __init__(self, data: dict, device: str):
        self.data, self.device, self.size = data, device, self.sizes[device]

    def layers(self, row: Row) -> int:
        return round(self.size.layers * row.depth)

    def config(self, layers: int):
        """Of the plain model."""
        raise NotImplementedError

    def new_model(self, row: Row):
        return db.convert(self.config(self.layers(row)), **row.fields)

    def losses(self, model, share: float = 1.0) -> torch.Tensor:
        """Of each held-out text or image, or of a share of them, `[N]`."""
        raise NotImplementedError

    @property
    def items(self) -> int:
        """Tokens or images a batch."""
        return self.size.batch_size * self.size.length


class Text(Task):
    unit = "nats a token"

    def __init__(self, data: dict, device: str):
        super().__init__(data, device)
        self.train_set = Sequences(data["train"], self.size.length)
        every = Sequences(data["validation"], self.size.length).tokens
        self.held_out = every[:: max(1, len(every) // self.size.held_out)][: self.size.held_out]

    def config(self, layers: int):
        size = self.size
        return config_for(self.family, layers, size.width, self.data["vocab_size"], size.length, size.head_size)


TOGETHER = {"block_schedule": "together"}


class CausalText(Text):
    name, family, share = "causal text", "gpt2", 0.5
    sizes = {
        "cuda": Size(12, 768, 64, length=512, batch_size=32, learning_rate=6e-4, held_out=512),  # GPT-2 small
        "cpu": Size(4, 64, 32, length=64, batch_size=8, learning_rate=4e-3, held_out=128),
    }
    rows = {
        "end to end": Row(),
        "end to end, one block's depth": Row(depth=1 / 4),
        "B=4, own losses, local heads, together (recommended)": Row({"num_blocks": 4}, arguments=TOGETHER),
        "end to end, the seconds of the slowest row of blocks": Row(equal_seconds=True),
    }

    def new_model(self, row: Row):
        config = self.config(self.layers(row))
        return AutoModelForCausalLM.from_config(config) if row.fields is None else db.convert(config, **row.fields)

    @torch.no_grad()
    def losses(self, model, share: float = 1.0) -> torch.Tensor:
        found = []
        for tokens in self.held_out[: math.ceil(share * len(self.held_out))].to(model.device).split(8):
            logits = model(tokens, use_cache=False).logits[:, :-1].float()
            nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            found.append(nats.view(len(tokens), -1).mean(1))
        return torch.cat(found).cpu()


class MaskedText(Text):
    """Nats by the likelihood bound, with the same masks for all rows; the mask is the last number of the vocabulary."""

    name, family, share = "masked text", "llama", 0.3
    sizes = {
        "cuda": Size(12, 512, 64, length=256, batch_size=64, learning_rate=1e-3, held_out=1024),
        "cpu": Size(3, 64, 32, length=64, batch_size=8, learning_rate=4e-3, held_out=256),
    }
    rows = {
        "end to end": Row({"num_blocks": 1}),
        "B=3, its layers in blocks (paper)": Row({"num_blocks": 3}),
        "B=3, blocks as deep as it": Row({"num_blocks": 3}, depth=3),
    }

    def new_model(self, row: Row):
        mask = self.data["vocab_size"] - 1
        plain = self.config(self.layers(row))
        return db.convert(plain, task="fill-mask", mask_token_id=mask, preset="paper", **row.fields)

    def losses(self, model, share: float = 1.0) -> torch.Tensor:
        texts = self.held_out[: math.ceil(share * len(self.held_out))]
        return bits_by_quarter(model, texts).mean(1) * math.log(2)


class Images(Task):
    """EDM's loss, at the same noise for all rows."""

    name, unit, share = "images", "held-out loss", 0.2
    sizes = {
        "cuda": Size(12, 384, 64, length=1, batch_size=256, learning_rate=1e-3, held_out=5000),
        "cpu": Size(3, 48, 24, length=1, batch_size=32, learning_rate=4e-3, held_out=500),
    }
    patch_sizes = {"cuda": 2, "cpu": 7}
    rows = {
        "end to end": Row({"num_blocks": 1}),
        "B=3, its layers in blocks, own ends (recommended)": Row({"num_blocks": 3}),
        "B=3, blocks as deep as it": Row({"num_blocks": 3, "preset": "paper"}, depth=3),
    }
    collator = staticmethod(collate)

    def __init__(self, data: dict, device: str):
        super().__init__(data, device)
        self.train_set = torch.utils.data.TensorDataset(*data["images"]["train"])
        self.held_out = [tensor[: self.size.held_out] for tensor in data["images"]["test"]]

    def config(self, layers: int) -> DiTConfig:
        size = self.size
        return DiTConfig(
            num_layers=layers, num_attention_heads=size.width // size.head_size, attention_head_dim=size.head_size,
            in_channels=1, sample_size=28, patch_size=self.patch_sizes[self.device], num_embeds_ada_norm=10,
        )  # fmt: skip

    def new_model(self, row: Row):
        return db.convert(self.config(self.layers(row)), sigma_data=SIGMA_DATA, **row.fields)

    def losses(self, model, share: float = 1.0) -> torch.Tensor:
        images, labels = (tensor[: math.ceil(share * self.size.held_out)] for tensor in self.held_out)

        def denoise(*inputs: torch.Tensor) -> torch.Tensor:  # noise is drawn on the CPU, the same on every device
            return model.denoise(*(tensor.to(model.device) for tensor in inputs)).cpu()

        return held_out_errors(denoise, images, labels, SIGMA_DATA).mean(0)


TASKS = (CausalText, MaskedText, Images)


def new_trainer(task: Task, row: Row, model, updates: int, output: str, callbacks=(), measure_memory=False) -> Trainer:
    """Of a row. The memory of the stock Trainer is not followed."""
    size = task.size
    common = dict(
        output_dir=output, per_device_train_batch_size=size.batch_size, learning_rate=size.learning_rate,
        weight_decay=0.1, adam_beta2=0.95, lr_scheduler_type="cosine", warmup_steps=0.05, use_cpu=task.device == "cpu",
        bf16=task.device == "cuda", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, logging_nan_inf_filter=False,  # (which waits for the device in every step)
    )  # fmt: skip
    given = dict(
        model=model, train_dataset=task.train_set, data_collator=task.collator, callbacks=list(callbacks)
    )  # fmt: skip
    if row.fields is None:
        trainer = ChunkedTrainer(args=TrainingArguments(max_steps=updates, **common), **given)
    else:
        common |= {"updates_per_block": updates, "measure_memory": measure_memory, **row.arguments}
        trainer = db.DiffusionBlocksTrainer(args=db.DiffusionBlocksTrainingArguments(**common), **given)
    trainer.remove_callback(PrinterCallback)
    return trainer
