"""The ladder: ways to train the layers of a text model, whole and by block, for the benchmarks of depth.

All give every parameter of the layers as many updates. "End to end" trains a plain model; blocks, on their own loss, read out
themselves, through local heads or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from block_variants import KeepsInput, pass_input_beside, remember_what_is_passed_on
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import hf_diffusionblocks as db

LAYERS = 8
NO_HEAD, HEAD = ({"local_head_layers": layers} for layers in (0, 1))
TOGETHER, IN_TURN = {"block_schedule": "together"}, {"block_schedule": "random"}
PAPER = {"preset": "paper"}


@dataclass(frozen=True)
class Row:
    """A way to train.

    Args:
        fields: what `convert` is given; None is a plain model.
        layers: of the model.
        arguments: of the Trainer.
        input_beside: whether the embedded input is added to what enters each block.
        keeps_input: whether blocks are trained to keep their input, too.
    """

    fields: dict | None
    layers: int = LAYERS
    arguments: dict = field(default_factory=dict)
    input_beside: bool = False
    keeps_input: bool = False


ROWS: dict[str, Row] = {
    "end to end, 8 layers": Row(None),
    "end to end, 2 layers": Row(None, layers=2),
    "end to end, 3 layers": Row(None, layers=3),
    "end to end, 4 layers": Row(None, layers=4),
    "B=4, own loss, no local head": Row(NO_HEAD, arguments=TOGETHER),
    "B=4, own loss, local head of one layer": Row(HEAD, arguments=TOGETHER),
    "B=4, own loss, local head of two layers": Row({**HEAD, "local_head_layers": 2}, arguments=TOGETHER),
    "B=4, own loss, local head of one layer, own ends": Row({**HEAD, "shared": "per_block"}, arguments=TOGETHER),
    "B=4, own loss, local head of one layer, in turn": Row(HEAD, arguments=IN_TURN),
    "B=2, own loss, local head of one layer": Row({**HEAD, "num_blocks": 2}, arguments=TOGETHER),
    "B=8, own loss, local head of one layer": Row({**HEAD, "num_blocks": 8}, arguments=TOGETHER),
    "B=4, own loss, local head of one layer, input kept": Row(HEAD, arguments=TOGETHER, keeps_input=True),
    "B=4, own loss, local head of one layer, input beside": Row(HEAD, arguments=TOGETHER, input_beside=True),
    "end to end, 12 layers": Row(None, layers=12),
    "B=6 of 12 layers, own loss, local head of one layer": Row({**HEAD, "num_blocks": 6}, layers=12, arguments=TOGETHER),
    "B=4, the paper's settings": Row(PAPER, arguments=IN_TURN),
}


def new_model(row: Row, source: PreTrainedConfig, plain: type = AutoModelForCausalLM) -> PreTrainedModel:
    """A fresh model of a row, by this class of Transformers; of blocks, what `convert` makes of a config."""
    if row.fields is None:
        return plain.from_config(source)
    model = db.convert(source, **{"num_blocks": 4, **row.fields})
    if row.input_beside:
        pass_input_beside(model)
    if row.keeps_input:
        remember_what_is_passed_on(model)
    return model


def new_trainer(
    model: PreTrainedModel, row: Row, rows: Dataset, updates: int, plain: type[Trainer] = Trainer, **arguments
) -> Trainer:
    """A row's Trainer, for so many updates of every layer.

    Args:
        plain: that of plain models.
        arguments: of any Trainer.
    """
    arguments |= dict(
        lr_scheduler_type="cosine", warmup_steps=0.05, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    if row.fields is None:
        return plain(model=model, args=TrainingArguments(max_steps=updates, **arguments), train_dataset=rows)
    args = db.DiffusionBlocksTrainingArguments(updates_per_block=updates, **row.arguments, **arguments)
    by_block = KeepsInput if row.keeps_input else db.DiffusionBlocksTrainer
    return by_block(model=model, args=args, train_dataset=rows)
