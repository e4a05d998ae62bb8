"""Train a generator of images (a DiT of diffusers) block by block (or all layers as one block, for comparison).

    accelerate launch recipes/train_image_generation.py --config recipes/configs/fashion_mnist_dit.yaml \\
        --train_file train.parquet --validation_file test.parquet --output_dir outputs/fashion_mnist_dit

Starts from a fresh model (`--config_name`) or a saved `DiTTransformer2DModel` (`--model_name_or_path`, weights kept); reads
a hub data set, parquet files or folders of images. `--help` lists every option; a YAML file sets any of them, and the
command line overrides it.

Images are pixels, not latents. `eval_loss` is the denoising loss of held-out images over all noise levels, and
`eval_loss_block_k` a block's own; pictures drawn from the model are in the output folder's `samples`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import PreTrainedConfig, Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, train_image_classification
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.formulation import denoiser_fields
from hf_diffusionblocks.recipes.train_image_classification import find_labels, load_data

PROG = "train_image_generation.py"
TASK = "image-generation"
MEASURED = 1024  #: training images that sigma_data is measured on
BATCH = 64  #: of those that are in memory at a time
MOST_CLASSES = 10  #: columns of a grid of samples


@dataclass
class ModelArguments(common.ModelArguments):
    end_to_end: bool = option(
        False, "Train all layers as one block, which denoises at all noise levels: the usual diffusion model."
    )


@dataclass
class DataArguments(train_image_classification.DataArguments):
    """Which data: `dataset_name`, `train_file` or `train_dir`."""

    train_file: str | None = option(None, "Parquet file with a column of images.")
    train_dir: str | None = option(None, "Folder of images; if they are labelled, in a sub-folder for each label.")
    label_column: str | None = option(
        None, "Name of the column of labels (class names, words or numbers). Default: none, images of no class."
    )
    random_flip: bool = option(
        False, "Mirror half of the training images, drawn anew each time they are read (and by a resumed run)."
    )


@dataclass
class SampleArguments:
    """What is drawn from the model: a grid with a column a class, in as many steps as `num_inference_steps` says."""

    sample_every_n_steps: int = option(0, "Draw samples every that many optimizer steps; 0: at the end alone.")
    guidance_scale: float = option(1.0, "Of classifier-free guidance in the samples; 1 is none.")


def check_arguments(model_args: ModelArguments, data_args: DataArguments, samples: SampleArguments) -> None:
    """What of them is this recipe's own."""
    common.check_arguments(model_args, data_args)
    if samples.sample_every_n_steps < 0:
        raise ValueError(f"sample_every_n_steps={samples.sample_every_n_steps} must be at least 0")
    if samples.guidance_scale != 1 and data_args.label_column is None:
        raise ValueError(f"guidance_scale={samples.guidance_scale} needs label_column: without classes it must be 1")
    overrides = [part.split("=")[0].strip() for part in (model_args.config_overrides or "").split(",")]
    if "num_embeds_ada_norm" in overrides:
        raise ValueError("config_overrides must not set num_embeds_ada_norm: it is the number of classes in the data")


def check_config(config: PreTrainedConfig) -> None:
    """Raises ValueError if this model is not for the pixels of images."""
    if not isinstance(config, DiTConfig):
        raise ValueError(f"model_type={config.model_type!r} must be {DiTConfig.model_type!r}, for task {TASK!r}")
    if config.in_channels not in (1, 3):
        raise ValueError(
            f"in_channels={config.in_channels} must be 1 (grayscale) or 3 (RGB): this recipe trains on pixels, not latents"
        )


# ---- data


def check_size(image: Image.Image, args: DataArguments, size: int) -> None:
    """Raises ValueError if an image would have to be enlarged."""
    if min(image.size) < size:
        raise ValueError(
            f"image_column={args.image_column!r} has an image of {image.width} x {image.height}, smaller than the "
            f"model's sample_size={size}"
        )


def make_transform(
    config: DiTConfig, args: DataArguments, class_of: dict[str | int, int] | None, flip: bool
) -> Callable[[dict], dict]:
    """What turns rows of the data into the model's inputs, when they are read.

    Args:
        class_of: label in the data -> class of the model; None where there are none.
        flip: mirror half of the images.
    """
    from diffusers.image_processor import VaeImageProcessor  # (by now `check_model` has said it if diffusers is missing)

    mode, size = {1: "L", 3: "RGB"}[config.in_channels], config.sample_size
    processor = VaeImageProcessor(do_resize=False)

    def fitted(image: Image.Image) -> Image.Image:
        image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)
        return ImageOps.mirror(image) if flip and torch.rand(()) < 0.5 else image

    def transform(rows: dict) -> dict:
        made = {"pixel_values": processor.preprocess([fitted(image) for image in rows[args.image_column]])}
        if class_of is not None:
            made["class_labels"] = [class_of[value] for value in rows[args.label_column]]
        return made

    return transform


def name_classes(config: DiTConfig, labels: dict[str | int, str], is_new: bool) -> dict[str | int, int]:
    """Give the config the names of the labels; returns label in the data -> class of the model.

    Args:
        labels: of [`find_labels`].
        is_new: whether the model has fresh weights: its classes are then the data's. Otherwise a label that is a number
            is the model's class of that number.

    Raises:
        ValueError: the model has no such class.
    """
    if is_new:
        config.num_embeds_ada_norm = len(labels)
        config.id2label = dict(enumerate(labels.values()))
        class_of = {value: index for index, value in enumerate(labels)}
    else:
        numbers = all(isinstance(value, int) for value in labels)
        class_of = {value: value if numbers else index for index, value in enumerate(labels)}
        if beyond := [labels[value] for value, k in class_of.items() if not 0 <= k < config.num_embeds_ada_norm]:
            raise ValueError(f"labels {beyond} are beyond the model's num_embeds_ada_norm={config.num_embeds_ada_norm} classes")
        config.id2label = config.id2label | {k: labels[value] for value, k in class_of.items()}
    config.label2id = {name: index for index, name in config.id2label.items()}
    return class_of


def measure_sigma_data(data: Dataset, seed: int) -> float:
    """The standard deviation of the pixels of some training images, drawn at random."""
    sample = data.shuffle(seed=seed).select(range(min(MEASURED, len(data))))
    moments = []
    for batch in sample.iter(BATCH):
        pixels = batch["pixel_values"].flatten(1).double()
        moments.append(torch.stack([pixels.mean(1), pixels.square().mean(1)], 1))
    mean, square = torch.cat(moments).mean(0).tolist()
    return round(math.sqrt(max(square - mean**2, 0.0)), 4)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, samples: SampleArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    check_arguments(model_args, data_args, samples)
    config = common.plain_config(model_args)
    fields = denoiser_fields(model_args, blocks_args, TASK, config)
    common.check_blocks(fields, training_args)
    resume_from = common.checkpoint_to_resume(training_args)
    check_config(config)
    with torch.device("meta"):
        number = torch.zeros(1, dtype=torch.long)
        shapes = {
            "hidden_states": torch.zeros(1, config.in_channels, config.sample_size, config.sample_size),
            "timestep": number, "class_labels": number,
        }  # fmt: skip
    common.check_model(model_args, config, TASK, fields, shapes)

    with training_args.main_process_first(local=False, desc="reading the data"):
        data = load_data(data_args, training_args.seed, partial(check_size, args=data_args, size=config.sample_size))
    class_of = None
    if data_args.label_column is not None:
        labels = find_labels(data, data_args.label_column)
        class_of = name_classes(config, labels, is_new=not model_args.model_name_or_path)
    inputs = data.with_transform(make_transform(config, data_args, class_of, flip=False))
    if blocks_args.sigma_data is None:
        fields["sigma_data"] = measure_sigma_data(inputs["train"], training_args.seed)
    if data_args.random_flip:
        inputs["train"] = data["train"].with_transform(make_transform(config, data_args, class_of, flip=True))
    training_args.remove_unused_columns = False  # the transform needs the columns that the model does not know

    model = common.load_model(model_args, config, TASK, fields, training_args)
    for each in (model.config, model.config.source_config):  # (a config of diffusers has no names)
        each.id2label, each.label2id = config.id2label, config.label2id
    trainer = common.make_trainer(db.DiffusionBlocksTrainer, model, data_args, training_args, inputs)
    trainer.add_callback(
        db.SampleImages(trainer, samples.sample_every_n_steps, sample_labels(class_of), guidance_scale=samples.guidance_scale)
    )
    return trainer, resume_from


def sample_labels(class_of: dict[str | int, int] | None) -> list[int] | None:
    """Of a grid of samples: a column a class, and as many rows."""
    if class_of is None:
        return None
    classes = list(class_of.values())[:MOST_CLASSES]
    return classes * len(classes)


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(
        prepare, (ModelArguments, DataArguments, SampleArguments), args, PROG, description=__doc__.splitlines()[0]
    )


if __name__ == "__main__":
    main()
