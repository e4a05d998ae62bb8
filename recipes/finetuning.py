"""What the fine-tuning recipes add to the training recipes: adapters, and a stock model at the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import shards
from hf_diffusionblocks.recipes import common
from hf_diffusionblocks.recipes.common import option

logger = logging.getLogger("hf_diffusionblocks.recipes.finetuning")

LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass
class FinetuningArguments:
    """What is trained, and what is left at the end."""

    peft: str | None = field(
        default=None,
        metadata={"help": "'lora': train an adapter a block, not the block itself.", "choices": ["lora"]},
    )
    lora_r: int | None = option(None, "Rank of the adapters. Default: 8.")
    lora_alpha: int | None = option(None, "Their scale, over the rank. Default: twice the rank.")
    lora_dropout: float | None = option(None, "Dropout of what enters them. Default: none.")
    lora_target_modules: list[str] | None = option(
        None, "Parts of a layer that are adapted, for example q_proj v_proj; or all-linear. Default: the attention's usual "
        "ones.",
    )
    export_plain: str | None = option(
        None, "Folder for the trained model as a stock Transformers model, adapters merged, with its tokenizer or "
        "image processor: to be used without this package.",
    )


def not_an_option(default=None):
    """In place of an option that describes fresh weights."""
    return field(init=False, default=default)


def check_source(model_args: common.ModelArguments) -> None:
    """Raises ValueError unless a pretrained model is named."""
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path must name the model to fine-tune")


def check_arguments(
    model_args: common.ModelArguments, tuning: FinetuningArguments, fields: dict[str, Any] | None,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> None:  # fmt: skip
    """`fields` are those of [`blocks_fields`]. Raises ValueError naming the field, its value and what is allowed."""
    for name in LORA_OPTIONS:
        if (value := getattr(tuning, name)) is not None and tuning.peft is None:
            raise ValueError(f"{name}={value} needs peft='lora'")
    for name in ("lora_r", "lora_alpha"):
        if (value := getattr(tuning, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if tuning.lora_dropout is not None and not 0 <= tuning.lora_dropout < 1:
        raise ValueError(f"lora_dropout={tuning.lora_dropout} must be from 0 to below 1")
    for name in ("peft", "export_plain"):
        if (value := getattr(tuning, name)) and model_args.end_to_end:
            raise ValueError(f"{name}={value!r} must not be set with end_to_end: that trains the plain model itself")
    if tuning.export_plain:
        _check_export(tuning.export_plain, fields, training_args)


def _check_export(
    folder: str, fields: dict[str, Any], training_args: db.DiffusionBlocksTrainingArguments
) -> None:
    if (fields["denoiser"], fields["context"]) != ("factorized", "carried"):
        raise ValueError(
            f"export_plain={folder!r} needs denoiser='factorized' and context='carried', not "
            f"{fields['denoiser']!r} and {fields['context']!r}: no stock model computes their logits"
        )
    if training_args.train_blocks is not None and training_args.objective_of(fields["objective"]) == "local":
        raise ValueError(
            f"export_plain={folder!r} needs all blocks: with train_blocks={training_args.train_blocks} some are not loaded"
        )
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"export_plain={folder!r} must be a new or empty folder")


def adapt(
    model: PreTrainedModel, tuning: FinetuningArguments, modules_to_save: list[str] | None = None
) -> PreTrainedModel:
    """The model, with the adapters that are asked for.

    Args:
        modules_to_save: what is trained whole beside them.
    """
    from hf_diffusionblocks import lora  # first: it says how to get peft
    from peft import LoraConfig

    rank, targets = tuning.lora_r or 8, tuning.lora_target_modules
    config = LoraConfig(
        r=rank, lora_alpha=tuning.lora_alpha or 2 * rank, lora_dropout=tuning.lora_dropout or 0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets, modules_to_save=modules_to_save,
    )  # fmt: skip
    return lora.add_block_adapters(model, config)


def export(trainer: Trainer, tuning: FinetuningArguments) -> None:
    """Write the stock model, if it is asked for; the folder is written whole or not at all."""
    if not tuning.export_plain or not trainer.is_world_process_zero():
        return
    model = trainer.model
    with trainer.averaged_weights(), shards.atomic_save(Path(tuning.export_plain)) as folder:
        if model.has_adapters:
            model = db.lora.merge_and_unload(model)
        model.to_plain().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    logger.info(f"the stock {model.architecture.plain_class.__name__} is in {tuning.export_plain}")
