"""Train an image classifier block by block (or end to end, for comparison).

    accelerate launch recipes/train_image_classification.py --config recipes/configs/fashion_mnist.yaml \\
        --train_file train.parquet --validation_file test.parquet --output_dir outputs/fashion_mnist

Starts from a pretrained model (`--model_name_or_path`, weights kept) or a fresh one (`--config_name`); reads a hub data
set, parquet files or folders of images. `--help` lists every option; a YAML file sets any of them, and the command
line overrides it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, EvalPrediction,
    PreTrainedConfig, PreTrainedModel, Trainer, ViTImageProcessorPil, set_seed,
)  # fmt: skip
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_utils import get_last_checkpoint

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments, config_fields, parse

PROG = "train_image_classification.py"
#: The recipe's defaults where they are not the class's (the paper's): what benchmarks/quality_images.py found best.
BEST_MEASURED = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0, "p_mean": 0.5}


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model is trained: `model_name_or_path` or `config_name`."""

    model_name_or_path: str | None = _option(
        None, "Hub id or folder of a plain pretrained model. Its weights are kept; a head of other labels is new."
    )
    config_name: str | None = _option(
        None, "For fresh weights: hub id, folder or JSON file of a plain config, or a bare model type such as vit."
    )
    config_overrides: str | None = _option(
        None, "Changes to the config of config_name, such as hidden_size=64,num_hidden_layers=6."
    )
    image_processor_name: str | None = _option(
        None, "Hub id or folder of the image processor. Default: the pretrained model's, or else one that resizes to "
        "the config's image_size and normalizes with mean and deviation 0.5.",
    )
    end_to_end: bool = _option(
        False, "Train the plain model with the stock Trainer instead; updates_per_block is then its max_steps."
    )


@dataclass
class DataArguments:
    """Which data: `dataset_name`, `train_file` or `train_dir`."""

    dataset_name: str | None = _option(None, "Hub id of the data set; uses its splits train and, if any, validation.")
    dataset_config_name: str | None = _option(None, "Configuration of the hub data set.")
    train_file: str | None = _option(None, "Parquet file with a column of images and one of labels.")
    validation_file: str | None = _option(None, "Parquet file to evaluate on.")
    train_dir: str | None = _option(None, "Folder with a sub-folder of images for each label.")
    validation_dir: str | None = _option(None, "Folder to evaluate on, laid out as train_dir.")
    image_column: str = _option("image", "Name of the column of images.")
    label_column: str = _option("label", "Name of the column of labels: class names, words or numbers.")
    validation_split: float = _option(
        0.1, "Share of the training data to evaluate on instead, where there is no validation data; 0 for none."
    )
    max_train_samples: int | None = _option(None, "Train on that many randomly chosen examples only.")
    max_eval_samples: int | None = _option(None, "Evaluate on that many randomly chosen examples only.")


# ---- checks that need neither data nor weights


def check_arguments(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    _check_one_of(model_args, "model_name_or_path", "config_name")
    _check_one_of(data_args, "dataset_name", "train_file", "train_dir")
    for arguments, name, needed in (
        (model_args, "config_overrides", "config_name"),
        (data_args, "dataset_config_name", "dataset_name"),
        (data_args, "validation_file", "train_file"),
        (data_args, "validation_dir", "train_dir"),
    ):
        if getattr(arguments, name) and not getattr(arguments, needed):
            raise ValueError(f"{name}={getattr(arguments, name)!r} needs {needed}")
    for name in ("train_file", "validation_file", "train_dir", "validation_dir"):
        value = getattr(data_args, name)
        kind, exists = ("file", Path.is_file) if name.endswith("file") else ("folder", Path.is_dir)
        if value and not exists(Path(value)):
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


def checkpoint_to_resume(args: db.DiffusionBlocksTrainingArguments) -> str | None:
    """The folder `resume_from_checkpoint` stands for."""
    value = args.resume_from_checkpoint
    if str(value).lower() in ("none", "false"):
        return None
    if str(value).lower() in ("true", "last"):
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if last is None:
            raise ValueError(f"resume_from_checkpoint={value!r}: output_dir={args.output_dir!r} has no checkpoint")
        return last
    if not Path(value).is_dir():
        raise ValueError(f"resume_from_checkpoint={value!r} must be a checkpoint's folder, or 'last'")
    return value


# ---- data


def load_data(args: DataArguments, seed: int) -> DatasetDict:
    """Splits "train" and, if there is anything to evaluate on, "validation"; images are decoded when read."""
    try:
        data = _read_source(args)
    except DatasetGenerationError as error:
        raise ValueError(f"the data cannot be read: {error.__cause__}") from None
    if "train" not in data:
        raise ValueError(f"dataset_name={args.dataset_name!r} must have a split 'train', it has {', '.join(data)}")
    columns = data["train"].column_names
    for name in ("image_column", "label_column"):
        if getattr(args, name) not in columns:
            raise ValueError(f"{name}={getattr(args, name)!r} must be a column of the data: {', '.join(columns)}")
    if "validation" not in data and args.validation_split:
        parts = data["train"].train_test_split(args.validation_split, seed=seed)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    sizes = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, size in sizes.items():
        if split in data:
            data[split] = _decode_images(data[split], args.image_column)
            if size is not None:
                data[split] = data[split].shuffle(seed=seed).select(range(min(size, len(data[split]))))
    return data


def _read_source(args: DataArguments) -> DatasetDict:
    if args.dataset_name:
        return load_dataset(args.dataset_name, args.dataset_config_name)
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file}
        return load_dataset("parquet", data_files={split: file for split, file in files.items() if file})
    folders = {"train": args.train_dir, "validation": args.validation_dir}
    return load_dataset("imagefolder", data_files={split: f"{f}/**" for split, f in folders.items() if f})


def _decode_images(data: Dataset, column: str) -> Dataset:
    """The column as PIL images, whether it holds paths, bytes or both."""
    try:
        data = data.cast_column(column, datasets.Image())
        data[0]
    except Exception as error:  # Arrow, PIL and datasets each raise their own
        raise ValueError(f"image_column={column!r} must hold images: {error}") from None
    return data


def find_labels(data: DatasetDict, column: str) -> dict[str | int, str]:
    """Value in the data -> name, in the order of the model's classes."""
    feature = data["train"].features[column]
    found = {split: set(data[split].unique(column)) for split in data}
    if isinstance(feature, ClassLabel):
        labels = dict(enumerate(feature.names))
    elif None in found["train"]:
        raise ValueError(f"label_column={column!r} must have a label in every row")
    else:
        labels = {value: str(value) for value in sorted(found["train"])}
    for split, values in found.items():
        if unknown := values - set(labels):
            raise ValueError(f"label_column={column!r}: {unknown} in the {split} data is no label of the training data")
    return labels


def make_transform(
    processor: BaseImageProcessor, num_channels: int, labels: dict[str | int, str], args: DataArguments
) -> Callable[[dict], dict]:
    """What turns rows of the data into the model's inputs, when they are read."""
    mode = {1: "L", 3: "RGB"}[num_channels]
    class_of = {value: index for index, value in enumerate(labels)}

    def transform(rows: dict) -> dict:
        images = [image.convert(mode) for image in rows[args.image_column]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": [class_of[value] for value in rows[args.label_column]]}

    return transform


# ---- model


def plain_config(args: ModelArguments) -> PreTrainedConfig:
    """Config of the plain model."""
    name = args.model_name_or_path or args.config_name
    if args.config_name in CONFIG_MAPPING and not Path(args.config_name).exists():
        config = AutoConfig.for_model(args.config_name)
    else:
        config = AutoConfig.from_pretrained(name)
    if isinstance(config, db.DiffusionBlocksConfig):
        raise ValueError(f"{name!r} is a DiffusionBlocks model already: name the plain one")
    if args.config_overrides:
        overrides = "".join(args.config_overrides.split())  # a long line of YAML is folded at spaces
        try:
            config.update_from_string(overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config_overrides={overrides!r} must be field=value,field=value: {error}") from None
    if getattr(config, "num_channels", 3) not in (1, 3):
        raise ValueError(f"num_channels={config.num_channels} must be 1 (grayscale) or 3 (RGB)")
    return config


def load_model(args: ModelArguments, config: PreTrainedConfig, fields: dict | None) -> PreTrainedModel:
    """The plain model, or the DiffusionBlocks model if `fields` for `convert` are given."""
    if args.model_name_or_path:
        plain = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, config=config, use_safetensors=True, ignore_mismatched_sizes=True
        )
        return plain if fields is None else db.convert(plain, **fields)
    return AutoModelForImageClassification.from_config(config) if fields is None else db.convert(config, **fields)


def load_image_processor(args: ModelArguments, config: PreTrainedConfig) -> BaseImageProcessor:
    """The processor that is asked for, the pretrained model's, or a new one."""
    if args.image_processor_name:
        return AutoImageProcessor.from_pretrained(args.image_processor_name)
    if args.model_name_or_path:
        try:
            return AutoImageProcessor.from_pretrained(args.model_name_or_path)
        except OSError:  # it was saved without
            pass
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5] * getattr(config, "num_channels", 3)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


# ---- training


class PlainTrainer(Trainer):
    """The stock Trainer, but reading checkpoints as `from_pretrained` does: its own reading does not know the older
    parameter names that a ViT is saved with, and would leave the layers as they are."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        saved = type(self.model).from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of label-free logits: in evaluation a DiffusionBlocks model gives no others."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def prepare(
    model_args: ModelArguments, data_args: DataArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    check_arguments(model_args, data_args)
    resume_from = checkpoint_to_resume(training_args)
    config = plain_config(model_args)
    fields = None if model_args.end_to_end else config_fields(blocks_args)
    if fields is not None:
        with torch.device("meta"):  # complain before any data or weights are loaded
            db.convert(config, **fields)
    processor = load_image_processor(model_args, config)

    data = load_data(data_args, training_args.seed)
    labels = find_labels(data, data_args.label_column)
    config.id2label = dict(enumerate(labels.values()))
    config.label2id = {name: index for index, name in config.id2label.items()}
    data = data.with_transform(make_transform(processor, getattr(config, "num_channels", 3), labels, data_args))
    training_args.remove_unused_columns = False  # the transform needs the columns that the model does not know

    model = load_model(model_args, config, fields)
    if not model_args.end_to_end:
        # For the model card, which takes hub ids only.
        model.config.training_report = {"dataset": data_args.dataset_name} if data_args.dataset_name else None
    elif training_args.updates_per_block is not None:
        training_args.max_steps = training_args.updates_per_block
    trainer = (PlainTrainer if model_args.end_to_end else db.DiffusionBlocksTrainer)(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    return trainer, resume_from


def train(trainer: Trainer, resume_from: str | None) -> dict[str, float]:
    """Train, evaluate and save; returns all metrics."""
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


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    types = (ModelArguments, DataArguments, BlocksArguments, db.DiffusionBlocksTrainingArguments)
    arguments = parse(types, args, defaults=BEST_MEASURED, prog=PROG, description=__doc__.splitlines()[0])
    training_args = arguments[-1]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_diffusionblocks").setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    set_seed(training_args.seed)
    try:
        trainer, resume_from = prepare(*arguments)
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        sys.exit(f"{PROG}: error: {' '.join(str(error).split())}")
    return train(trainer, resume_from)


if __name__ == "__main__":
    main()
