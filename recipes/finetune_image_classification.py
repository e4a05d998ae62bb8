"""Fine-tune a pretrained ViT on labels of your own, block by block, whole or by LoRA.

    accelerate launch recipes/finetune_image_classification.py --model_name_or_path google/vit-base-patch16-224 \\
        --peft lora --train_dir images/train --validation_dir images/test --updates_per_block 500 \\
        --learning_rate 1e-3 --output_dir outputs/tuned --export_plain outputs/plain

Reads a hub data set, parquet files or folders of images. The classifier is new unless the labels are the model's own,
and is trained whole, also beside adapters. `--help` lists every option; a YAML file sets any of them, and the command
line overrides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, finetuning, train_image_classification
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.finetuning import FinetuningArguments, not_an_option
from hf_diffusionblocks.recipes.formulation import blocks_fields
from hf_diffusionblocks.recipes.train_image_classification import DataArguments

PROG = "finetune_image_classification.py"


@dataclass
class ModelArguments(train_image_classification.ModelArguments):
    """Which model: `model_name_or_path`."""

    image_processor_name: str | None = option(None, "Hub id or folder of the image processor. Default: the model's.")
    config_name: str | None = not_an_option()
    config_overrides: str | None = not_an_option()


def prepare(
    model_args: ModelArguments, data_args: DataArguments, tuning: FinetuningArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    finetuning.check_source(model_args)
    config = common.plain_config(model_args)
    fields = blocks_fields(model_args, blocks_args, training_args, "image-classification", config)
    finetuning.check_arguments(model_args, tuning, fields, training_args)
    return train_image_classification.prepare(
        model_args, data_args, blocks_args, training_args,
        adapt=partial(finetuning.adapt, tuning=tuning, modules_to_save=["classifier"]) if tuning.peft else None,
    )  # fmt: skip


def finish(trainer: Trainer, *arguments) -> None:
    finetuning.export(trainer, arguments[2])


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(
        prepare, (ModelArguments, DataArguments, FinetuningArguments), args, PROG,
        description=__doc__.splitlines()[0], finish=finish,
    )  # fmt: skip


if __name__ == "__main__":
    main()
