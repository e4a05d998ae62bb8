"""The ladder: ways to train the layers of a text model, whole and by block, for the benchmarks of depth.

All give every parameter of the layers as many updates. "End to end" trains a plain model; blocks, on their own loss, read out
themselves, through local heads or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    fields: dict | None
    layers: int = LAYERS
    arguments: dict = field(default_factory=dict)


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
    "end to end, 12 layers": Row(None, layers=12),
    "B=6 of 12 layers, own loss, local head of one layer": Row({**HEAD, "num_blocks": 6}, layers=12, arguments=TOGETHER),
    "B=4, the paper's settings": Row(PAPER, arguments=IN_TURN),
}


def new_model(row: Row, source: PreTrainedConfig, plain: type = AutoModelForCausalLM) -> PreTrainedModel:
    """A fresh model of a row, by this class of Transformers; of blocks, what `convert` makes of a config."""
    if row.fields is None:
        return plain.from_config(source)
    return db.convert(source, **{"num_blocks": 4, **row.fields})


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
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=rows)
