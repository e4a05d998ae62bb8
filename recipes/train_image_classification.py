"""Train an image classifier block by block (or end to end, for comparison).

    accelerate launch recipes/train_image_classification.py --config recipes/configs/fashion_mnist.yaml \\
        --train_file train.parquet --validation_file test.parquet --output_dir outputs/fashion_mnist

Starts from a pretrained model (`--model_name_or_path`, weights kept) or a fresh one (`--config_name`); reads a hub data
set, parquet files or folders of images. `--help` lists every option; a YAML file sets any of them, and the command
line overrides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from PIL import Image
from transformers import (
    AutoImageProcessor, BaseImageProcessor, EvalPrediction, PreTrainedConfig, Trainer, ViTImageProcessorPil,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, files
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.formulation import blocks_fields

PROG = "train_image_classification.py"


@dataclass
class ModelArguments(common.ModelArguments):
    image_processor_name: str | None = option(
        None,
        "Hub id or folder of the image processor. Default: the pretrained model's, or else one that resizes to "
        "the config's image_size and normalizes with mean and deviation 0.5.",
    )


@dataclass
class DataArguments(common.DataArguments):
    """Which data: `dataset_name`, `train_file` or `train_dir`."""

    train_file: str | None = option(None, "Parquet file with a column of images and one of labels.")
    validation_file: str | None = option(None, "Parquet file to evaluate on.")
    train_dir: str | None = option(None, "Folder with a sub-folder of images for each label.")
    validation_dir: str | None = option(None, "Folder to evaluate on, laid out as train_dir.")
    image_column: str = option("image", "Name of the column of images.")
    label_column: str = option("label", "Name of the column of labels: class names, words or numbers.")


# ---- data


def load_data(args: DataArguments, seed: int, check_size: Callable[[Image.Image], None] | None = None) -> DatasetDict:
    """Splits "train" and, if there is anything to evaluate on, "validation"; images are decoded when read.

    Args:
        check_size: raises ValueError for an image that is too small.
    """
    columns = [name for name in ("image_column", "label_column") if getattr(args, name) is not None]
    data = common.load_data(args, columns, lambda: _read_files(args), seed, ordered=False)
    for split in data:
        data[split] = _decode_images(data[split], args.image_column)
        _check_images(data[split], split, args.image_column, check_size)
    return data


def _read_files(args: DataArguments) -> DatasetDict:
    if args.train_file:
        # (One by one: read together, the second would be given the first's names of classes.)
        return files.read_files(args, lambda file: ("parquet", {}))
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


def _check_images(data: Dataset, split: str, column: str, check_size: Callable[[Image.Image], None] | None) -> None:
    """Look at the header of every image, so that none ends a run that has long begun; raises ValueError, too."""
    stored = data.select_columns(column).cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(stored):
        with files.opened(row[column], f"image_column={column!r} of row {number} of the {split} data") as image:
            if check_size is not None:
                check_size(image)


def find_labels(data: DatasetDict, column: str) -> dict[str | int, str]:
    """Value in the data -> name, in the order of the model's classes."""
    feature = data["train"].features[column]
    for split in data:
        if not hasattr(kind := data[split].features[column], "dtype"):
            raise ValueError(f"label_column={column!r} must hold one label a row, in the {split} data it holds {kind}")
    found = {split: set(data[split].unique(column)) for split in data}
    if isinstance(feature, ClassLabel):
        labels = dict(enumerate(feature.names))
    elif None in found["train"]:
        raise ValueError(f"label_column={column!r} must have a label in every row")
    else:
        labels = {value: str(value) for value in sorted(found["train"])}
    for split, values in found.items():
        own = getattr(data[split].features[column], "names", None)
        if own and isinstance(feature, ClassLabel) and own != feature.names:
            raise ValueError(
                f"label_column={column!r}: the {split} data has the classes {own}, and must have those of the training "
                f"data, in their order: {feature.names}"
            )
        if unknown := values - set(labels):
            raise ValueError(f"label_column={column!r}: {unknown} in the {split} data is no label of the training data")
    return labels


def settle_labels(config: PreTrainedConfig, labels: dict, own_labels: Sequence[str]) -> tuple[dict, bool]:
    """Name the labels in a model's config: in the order of its classifier, if they are its own. They, and whether they are
    new."""
    is_new = {*labels.values()} != {*own_labels}
    if not is_new:
        labels = dict(sorted(labels.items(), key=lambda label: own_labels.index(label[1])))
    config.id2label = dict(enumerate(labels.values()))
    config.label2id = {name: index for index, name in config.id2label.items()}
    return labels, is_new


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


def load_image_processor(args: ModelArguments, config: PreTrainedConfig) -> BaseImageProcessor:
    """The processor that is asked for, the pretrained model's, or a new one."""
    if args.image_processor_name:
        return AutoImageProcessor.from_pretrained(args.image_processor_name)
    if args.model_name_or_path:
        try:
            return AutoImageProcessor.from_pretrained(args.model_name_or_path)
        except OSError:  # it was saved without
            pass
    height, width = _image_size(config)
    half = [0.5] * getattr(config, "num_channels", 3)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


def _image_size(config: PreTrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of label-free logits: in evaluation a DiffusionBlocks model gives no others."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def prepare(
    model_args: ModelArguments, data_args: DataArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    common.check_arguments(model_args, data_args)
    config = common.plain_config(model_args)
    fields = blocks_fields(model_args, blocks_args, "image-classification", config)
    common.check_blocks(fields, training_args)
    resume_from = common.checkpoint_to_resume(training_args)
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"num_channels={channels} must be 1 (grayscale) or 3 (RGB)")
    pixel_values = torch.zeros(1, channels, *_image_size(config), device="meta")
    common.check_model(model_args, config, "image-classification", fields, {"pixel_values": pixel_values})
    processor = load_image_processor(model_args, config)

    data = load_data(data_args, training_args.seed)
    labels = find_labels(data, data_args.label_column)
    own_labels = list(config.id2label.values()) if model_args.model_name_or_path else []
    labels, is_new = settle_labels(config, labels, own_labels)
    if (
        is_new
        and own_labels
        and fields is not None
        and not training_args.train_shared
        and fields.get("shared", "common") == "common"
    ):
        raise ValueError("train_shared=False must be True: the labels are new, so the classifier is to be trained")
    data = data.with_transform(make_transform(processor, channels, labels, data_args))
    training_args.remove_unused_columns = False  # the transform needs the columns that the model does not know

    new_head = "classifier" if is_new else None
    model = common.load_model(model_args, config, "image-classification", fields, training_args, new_head)
    trainer_class = common.PlainTrainer if model_args.end_to_end else db.DiffusionBlocksTrainer
    trainer = common.make_trainer(
        trainer_class, model, data_args, training_args, data, processing_class=processor, compute_metrics=accuracy
    )
    return trainer, resume_from


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(prepare, (ModelArguments, DataArguments), args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
