"""Fine-tune an image classifier on labels of your own with the stock Trainer: whole or by LoRA, streamed or not.

    accelerate launch recipes/finetune_image_classification.py --model google/vit-base-patch16-224 --stream \\
        --train_dir images/train --validation_dir images/test --learning_rate 5e-5 --output_dir outputs/tuned

Reads a hub data set, parquet files or folders of images. The classifier is new unless the labels are the model's own, and is
trained whole, also beside adapters. `--help` lists every option, those of TrainingArguments among them; a YAML file sets any
of them (`--config FILE.yaml`), and the command line overrides it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import parse
from hf_diffusionblocks.conversion import read_config
from hf_diffusionblocks.recipes import checks, common
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.train_image_classification import (
    DataArguments, accuracy, find_labels, load_data, make_transform, settle_labels,
)  # fmt: skip

PROG = "finetune_image_classification.py"


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model: str = field(metadata={"help": "Hub id or folder of an image classifier, with its image processor."})
    lora: bool = option(False, "Train LoRA adapters and the classifier, and leave the rest as it is.")
    lora_r: int = option(16, "Rank of the adapters; their scale is twice as much over the rank.")
    stream: bool = option(False, common.STREAM)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[Trainer, str | None]:
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    common.check_data(data_args)
    resume_from = common.checkpoint_to_resume(training_args)
    config = read_config(model_args.model)
    processor = AutoImageProcessor.from_pretrained(model_args.model)

    data = load_data(data_args, training_args.seed)
    labels, is_new = settle_labels(config, find_labels(data, data_args.label_column), list(config.id2label.values()))
    data = data.with_transform(make_transform(processor, getattr(config, "num_channels", 3), labels, data_args))
    training_args.remove_unused_columns = False  # the transform needs the columns that the model does not know

    model = AutoModelForImageClassification.from_pretrained(model_args.model, config=config, ignore_mismatched_sizes=True)
    if is_new:  # also where there are as many labels as before
        for part in model.classifier.modules():  # (a ResNet's is a Sequential)
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    if model_args.stream:
        db.stream_layers(model, training_args.device)
    if model_args.lora:
        lora = LoraConfig(
            r=model_args.lora_r, lora_alpha=2 * model_args.lora_r, target_modules="all-linear", modules_to_save=["classifier"]
        )
        model = get_peft_model(model, lora)
    trainer = (Trainer if model_args.lora else common.PlainTrainer)(
        model, training_args, train_dataset=data["train"], eval_dataset=data.get("validation"), processing_class=processor,
        compute_metrics=accuracy,
    )  # fmt: skip
    return trainer, resume_from


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    model_args, data_args, training_args = parse(
        (ModelArguments, DataArguments, TrainingArguments), args, prog=PROG, description=__doc__.splitlines()[0]
    )
    try:
        checks.begin(training_args)
        trainer, resume_from = prepare(model_args, data_args, training_args)
        checks.check_output(trainer)
    except common.BAD_INPUT as error:
        sys.exit(f"{PROG}: error: {' '.join(str(error).split())}")
    metrics = common.train(trainer, resume_from)
    return metrics


if __name__ == "__main__":
    main()
