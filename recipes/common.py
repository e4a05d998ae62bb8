"""What the training recipes share: arguments and their checks, reading data, making models, training, the main program.

A recipe (`train_<task>.py`, `finetune.py`) is run as a script or imported, so it imports this file by its
installed name.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, default_data_collator,
)  # fmt: skip
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

import hf_diffusionblocks as db
from hf_diffusionblocks.tasks import backbone_for
from hf_diffusionblocks.cli.arguments import BlocksArguments, parse
from hf_diffusionblocks.configuration import option
from hf_diffusionblocks.conversion import plain_part, read_config
from hf_diffusionblocks.extras import MissingExtraError
from hf_diffusionblocks.recipes import checks
from hf_diffusionblocks.saving.resident import checked_blocks
from hf_diffusionblocks.tasks import TASKS
from hf_diffusionblocks.training.checks import check_one_job
from hf_diffusionblocks.training.process_group import leave_at_exit

#: What the libraries below raise on bad input; anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, TypeError, OSError, SafetensorError, StrictDataclassError, MissingExtraError)
SPLITS = ("train", "validation")


STREAM = "Keep weights, gradients and optimizer state in host memory; a layer or two at a time is on the device."


@dataclass
class ModelArguments:
    """Which model is trained: `model_name_or_path` or `config_name`."""

    model_name_or_path: str | None = option(
        None, "Hub id or folder of a plain pretrained model. Its weights are kept; a head of other labels is new."
    )
    config_name: str | None = option(
        None,
        "For fresh weights: hub id, folder or JSON file of a plain config, or a bare model type (vit, llama, "
        "dit-transformer-2d).",
    )
    config_overrides: str | None = option(
        None, "Changes to the config of config_name, such as hidden_size=64,num_hidden_layers=6."
    )
    end_to_end: bool = option(
        False, "Train the plain model with the stock Trainer instead; updates_per_block is then its max_steps."
    )
    stream: bool = option(False, STREAM)


@dataclass
class DataArguments:
    """Which data: `dataset_name`, or files (or folders) of training and validation data."""

    dataset_name: str | None = option(None, "Hub id of the data set; uses its splits train and, if any, validation.")
    dataset_config_name: str | None = option(None, "Configuration of the hub data set.")
    train_file: str | None = option(None, "File to train on.")
    validation_file: str | None = option(None, "File to evaluate on.")
    validation_split: float = option(
        0.1, "Share of the training data to evaluate on instead, where there is no validation data; 0 for none."
    )
    max_train_samples: int | None = option(None, "Train on that many randomly chosen rows of the data only.")
    max_eval_samples: int | None = option(None, "Evaluate on that many randomly chosen rows of the data only.")


# ---- checks that need neither data nor weights


def check_arguments(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    _check_one_of(model_args, "model_name_or_path", "config_name")
    _check_needs(model_args, "config_overrides", "config_name")
    check_data(data_args)


def check_data(data_args: DataArguments) -> None:
    """As [`check_arguments`], of the data alone."""
    sources = [name for name in ("dataset_name", "train_file", "train_dir") if hasattr(data_args, name)]
    paths = [f"{split}_{kind}" for kind in ("file", "dir") if hasattr(data_args, f"train_{kind}") for split in SPLITS]
    _check_one_of(data_args, *sources)
    _check_needs(data_args, "dataset_config_name", "dataset_name")
    for path in paths:
        _check_needs(data_args, path, path.replace("validation", "train"))
    for name in paths:
        value = getattr(data_args, name)
        kind, exists = ("file", Path.is_file) if name.endswith("file") else ("folder", Path.is_dir)
        if value and not (isinstance(value, str) and exists(Path(value))):
            raise ValueError(f"{name}={value!r} must be an existing {kind}")
    if not 0 <= data_args.validation_split < 1:
        raise ValueError(f"validation_split={data_args.validation_split} must be from 0 to below 1")
    for name in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(data_args, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_one_of(arguments, *names: str) -> None:
    given = [f"{name}={getattr(arguments, name)!r}" for name in names if getattr(arguments, name)]
    if len(given) != 1:
        raise ValueError(f"set exactly one of {', '.join(names)}, not {' and '.join(given) or 'none of them'}")


def _check_needs(arguments, name: str, needed: str) -> None:
    if getattr(arguments, name) and not getattr(arguments, needed):
        raise ValueError(f"{name}={getattr(arguments, name)!r} needs {needed}")


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The folder `resume_from_checkpoint` stands for."""
    value = args.resume_from_checkpoint
    if str(value).lower() in ("none", "false"):
        return None
    if str(value).lower() in ("true", "last"):
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if last is None:
            raise ValueError(f"resume_from_checkpoint={value!r}: output_dir={args.output_dir!r} has no checkpoint")
        return last
    if not Path(value, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"resume_from_checkpoint={value!r} must be a checkpoint's folder, or 'last'")
    return value


def plain_config(args: ModelArguments) -> PreTrainedConfig:
    """Config of the plain model."""
    name = args.model_name_or_path or args.config_name
    bare = args.config_name in CONFIG_MAPPING and not Path(args.config_name).exists()
    read = AutoConfig.for_model if bare else read_config
    config = read(name)
    if isinstance(config, db.DiffusionBlocksConfig):
        raise ValueError(f"{name!r} is a DiffusionBlocks model already: name the plain one")
    if args.config_overrides:
        overrides = _without_spaces(args.config_overrides)
        try:
            config.update_from_string(overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config_overrides={overrides!r} must be field=value,field=value: {error}") from None
        # Read again: what a config derives from other fields (the width of a head, the types of layers) follows them.
        changed = [part.split("=")[0] for part in overrides.split(",")]
        try:
            config = read(name, **{field: getattr(config, field) for field in changed})
        except Exception as error:  # an odd value surfaces as any exception at all
            raise ValueError(f"config_overrides={overrides!r} makes no config: {_described(error)}") from None
    return config


def _without_spaces(overrides: str) -> str:
    return "".join(overrides.split())  # a long line of YAML is folded at spaces


def check_model(
    args: ModelArguments, config: PreTrainedConfig, task: str, fields: dict | None, shapes: dict[str, torch.Tensor]
) -> None:
    """Build the model and run the plain one inside without memory, to complain before any data or weights are loaded.

    Args:
        task: what the model has to be for.
        fields: of [`blocks_fields`].
        shapes: inputs on the meta device.

    Raises:
        ValueError: a field is wrong, or the config makes no model.
    """
    source = repr(args.model_name_or_path or args.config_name)
    if args.config_overrides:
        source = f"config_overrides={_without_spaces(args.config_overrides)!r}"
    try:
        with torch.device("meta"), torch.no_grad():
            model = db.convert(config, task=task, **(fields or {"num_blocks": 1})).eval()
            model.backbone(**shapes)
    except BAD_INPUT:
        raise  # these say what is wrong
    except Exception as error:
        if "meta tensor" in str(error):  # the model wants to see a value: no fault of the config
            return
        raise ValueError(f"{source} makes no model that runs: {_described(error)}") from None
    if not all(parameter.numel() for parameter in model.parameters()):
        raise ValueError(f"{source} makes a model with weights of no width")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"  # a KeyError alone says little


def check_blocks(fields: dict[str, Any] | None, training_args: db.DiffusionBlocksTrainingArguments) -> None:
    """Whether `train_blocks`, if given, are blocks that one job may train; and whether there are blocks to average."""
    if fields is None and training_args.ema_decay is not None:
        given = f"ema_decay={training_args.ema_decay}"
        raise ValueError(f"{given} must not be set with end_to_end: the stock Trainer keeps no averages")
    chosen = training_args.train_blocks
    if chosen is None:
        return
    if fields is None:
        raise ValueError(f"train_blocks={chosen} must not be set with end_to_end: it has no blocks")
    checked_blocks(chosen, fields["num_blocks"], "train_blocks")
    if training_args.train_shared and fields.get("shared", "common") == "common":
        check_one_job(chosen, fields["num_blocks"])


# ---- data


def load_data(
    args: DataArguments, columns: Sequence[str], read_files: Callable[[], DatasetDict], seed: int, ordered: bool
) -> DatasetDict:
    """Splits "train" and, if there is anything to evaluate on, "validation".

    Args:
        columns: names of the arguments that name columns the data must have.
        read_files: reads what is not on the hub.
        seed: of what is drawn at random.
        ordered: whether neighbouring rows belong together, so that the last ones are split off, not random ones.
    """
    try:
        data = load_dataset(args.dataset_name, args.dataset_config_name) if args.dataset_name else read_files()
    except DatasetGenerationError as error:
        raise ValueError(f"the data cannot be read: {error.__cause__}") from None
    if "train" not in data:
        raise ValueError(f"dataset_name={args.dataset_name!r} must have a split 'train', it has {', '.join(data)}")
    for name in columns:
        for split in SPLITS:
            found = data[split].column_names if split in data else [getattr(args, name)]
            if getattr(args, name) not in found:
                raise ValueError(f"{name}={getattr(args, name)!r} must be a column of the {split} data: {', '.join(found)}")
    if "validation" not in data and args.validation_split:
        if len(data["train"]) < 2:
            raise ValueError(
                f"validation_split={args.validation_split} of {len(data['train'])} row of data cannot be set aside"
            )
        parts = data["train"].train_test_split(args.validation_split, seed=seed, shuffle=not ordered)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    sizes = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    return DatasetDict({split: _sample(data[split], size, seed) for split, size in sizes.items() if split in data})


def _sample(data: Dataset, size: int | None, seed: int) -> Dataset:
    """That many random rows, in the order they had."""
    if size is None or size >= len(data):
        return data
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:size]
    return data.select(chosen.sort().values.tolist())


# ---- model and training


def load_model(
    args: ModelArguments,
    config: PreTrainedConfig,
    task: str,
    fields: dict | None,
    training_args: db.DiffusionBlocksTrainingArguments,
    new_head: str | None = None,
) -> PreTrainedModel:
    """The plain model, or the DiffusionBlocks model if `fields` ([`blocks_fields`]) are given: what this job trains of it.
    Streamed, if that is asked for.

    `new_head` is the path of a pretrained linear head that starts anew, although its shape fits.
    """
    resident = None
    backbone = backbone_for(config, task)
    plain_class = backbone.plain_class
    if fields is not None and training_args.train_blocks is not None:
        blocks = db.DiffusionBlocksConfig(source_config=config, task=task, **fields)
        resident = training_args.train_blocks
        if TASKS[task].model_class.FORMULATIONS[blocks.preset].passes_on:  # the earlier ones run forward
            resident = list(range(max(resident) + 1))
        plain_class = plain_part(blocks, resident)
    if args.model_name_or_path:
        source = backbone.load_plain(plain_class, args.model_name_or_path, config, ignore_mismatched_sizes=True)
        if new_head is not None:
            head = source.get_submodule(new_head)
            torch.nn.init.normal_(head.weight, std=config.initializer_range)
            if head.bias is not None:
                torch.nn.init.zeros_(head.bias)
    else:
        source = plain_class._from_config(config) if fields is None else config
    model = source if fields is None else db.convert(source, task=task, resident_blocks=resident, **fields)
    if args.stream:
        db.stream_layers(model, training_args.device)
    return model


class PlainTrainer(Trainer):
    """The stock Trainer, but reading checkpoints as `from_pretrained` does: its own reading does not know the older
    parameter names that a ViT is saved with, and would leave the layers as they are."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        saved = type(self.model).from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def make_trainer(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    data_args: DataArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
    data: DatasetDict,
    data_collator: Callable = default_data_collator,
    **kwargs,
) -> Trainer:
    """The Trainer, once it is known what the card says of the data."""
    if isinstance(model, db.DiffusionBlocksPreTrainedModel):
        # For the model card, which takes hub ids only.
        model.config.training_report = {"dataset": data_args.dataset_name} if data_args.dataset_name else None
    elif training_args.updates_per_block is not None:
        training_args.max_steps = training_args.updates_per_block
    return trainer_class(
        model=model, args=training_args, train_dataset=data["train"], eval_dataset=data.get("validation"),
        data_collator=data_collator, **kwargs,
    )  # fmt: skip


def train(trainer: Trainer, resume_from: str | None) -> dict[str, float]:
    """Train, evaluate and save; returns all metrics."""
    leave_at_exit()
    metrics = trainer.train(resume_from_checkpoint=resume_from).metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        results = trainer.evaluate()
        trainer.log_metrics("eval", results)
        trainer.save_metrics("eval", results)
        metrics |= results
    trainer.save_model()  # after the evaluation, which the model card quotes
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def run(
    prepare: Callable[..., tuple[Trainer, str | None]],
    types: Sequence[type],
    args: Sequence[str] | None,
    prog: str,
    description: str,
) -> dict[str, float]:
    """A recipe's main program; bad input exits with one line on standard error.

    Args:
        prepare: given an instance of each of `types`, of BlocksArguments and of the training arguments, makes the
            Trainer and names the checkpoint it resumes from. It must find everything the user can get wrong.
        types: the recipe's arguments.
        args: the command line; None is `sys.argv[1:]`.
        prog, description: as in argparse.
    """
    types = (*types, BlocksArguments, db.DiffusionBlocksTrainingArguments)
    arguments = parse(types, args, prog=prog, description=description)
    training_args = arguments[-1]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_diffusionblocks").setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    try:
        checks.begin(training_args)
        trainer, resume_from = prepare(*arguments)
        checks.check_output(trainer)
    except BAD_INPUT as error:
        sys.exit(f"{prog}: error: {' '.join(str(error).split())}")
    metrics = train(trainer, resume_from)
    return metrics
