"""Arguments of [`DiffusionBlocksTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..configuration import option
from ..whole_numbers import check_whole
from .block_schedule import ORDERS


@dataclass
class DiffusionBlocksTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how blocks take turns.

    `max_steps` and `num_train_epochs` count optimizer steps as always, and each step trains one block, unless they are
    trained together: for as many updates a block as a plain model gets, set `updates_per_block` instead. Learning-rate
    schedules, warm-up included, run on each block's own update count.
    """

    block_schedule: str | None = option(
        None,
        "Which block each optimizer step trains: 'random' (each round of num_blocks steps visits every block once, in random "
        "order), or 'together': every step trains all, one after another, each alone with its gradients. Default: 'together' "
        "where a turn of one block would run others again (recommended, of next tokens and classes), else 'random'.",
        choices=list(ORDERS),
    )
    updates_per_block: int | None = option(
        None,
        "Optimizer steps for each block; the run takes as many for each block it trains (or, all together, as many). Replaces "
        "max_steps.",
    )
    train_blocks: list[int] | None = option(
        None, "The blocks this job trains; all other blocks stay as they are. Default: all."
    )
    train_shared: bool = option(
        True,
        "Whether to train what all blocks share (embeddings, final norm, head and sigma embeddings). A job that trains some "
        "of the blocks leaves it as it is, or has shared='per_block'.",
    )
    ema_decay: float | None = option(
        None,
        "Keep exponential moving averages (EMA) of the trained weights, in float32, for evaluation and what save_model "
        "writes: the decay at each update of a weight (less at its first ones), 0.999 for example. Default: none are kept.",
    )
    measure_memory: bool = option(
        True, "Follow the memory of the first two steps of each block, for log and model card; slows these steps."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.block_schedule not in (allowed := (None, *ORDERS)):
            raise ValueError(f"block_schedule={self.block_schedule!r} must be one of {', '.join(map(repr, allowed))}")
        if self.ema_decay is not None and not (isinstance(self.ema_decay, float) and 0 < self.ema_decay < 1):
            raise ValueError(f"ema_decay={self.ema_decay!r} must be above 0 and below 1, or None for no averages")
        if self.updates_per_block is not None:
            check_whole("updates_per_block", self.updates_per_block, 1, ", or None")
            if self.max_steps > 0:
                raise ValueError(
                    f"updates_per_block={self.updates_per_block} and max_steps={self.max_steps} both say how long to "
                    "train: set one"
                )
