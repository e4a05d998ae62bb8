"""What would end a run that has long begun, and can be told before."""

from __future__ import annotations

import math
import os
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames
from transformers.utils import is_torchao_available

import hf_diffusionblocks as db
from hf_diffusionblocks.saving.shards import check_overwrite
from hf_diffusionblocks.whole_numbers import check_whole

#: What numbers of a run must be, at least.
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0, "seed": 0,
}  # fmt: skip


def begin(args: TrainingArguments) -> None:
    """Seed the run. Raises ValueError, which names the field, for numbers that the Trainer would stumble over later."""
    for name, least in LEAST.items():
        check_whole(name, getattr(args, name), least)
    if not (isinstance(args.learning_rate, float) and 0 <= args.learning_rate < math.inf):
        raise ValueError(f"learning_rate={args.learning_rate!r} must be a finite number from 0")
    if args.optim in (OptimizerNames.ADAMW_TORCH_4BIT, OptimizerNames.ADAMW_TORCH_8BIT) and not is_torchao_available():
        raise ValueError(f"optim={args.optim.value!r} needs torchao: pip install torchao")
    set_seed(args.seed)


def check_output(trainer: Trainer) -> None:
    """Raises ValueError if what is trained could not be saved in the end."""
    model, folder = trainer.model, trainer.args.output_dir
    if trainer.args.should_save and not os.access(folder, os.W_OK):
        raise ValueError(f"output_dir={folder!r} must be a folder that can be written to")
    if isinstance(model, db.DiffusionBlocksPreTrainedModel) and len(model.resident_blocks) < model.num_blocks:
        check_overwrite(Path(folder), model.resident_blocks)
