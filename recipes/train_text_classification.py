"""Train a text classifier block by block (or end to end, for comparison).

    accelerate launch recipes/train_text_classification.py --model_name_or_path bert-base-uncased --num_blocks 4 \\
        --train_file train.parquet --validation_file validation.parquet --output_dir outputs/classes

Starts from a pretrained model, encoder or decoder (`--model_name_or_path`, weights kept), or a fresh one (`--config_name`); reads
a hub data set, or .parquet or .json(l) files with a column of texts and one of labels. `--help` lists every option; a YAML file
sets any of them (`--config FILE.yaml`), and the command line overrides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import DatasetDict
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase, Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, text
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.formulation import blocks_fields
from hf_diffusionblocks.recipes.text import ModelArguments
from hf_diffusionblocks.recipes.train_image_classification import accuracy, find_labels, settle_labels
from hf_diffusionblocks.tasks import backbone_for

PROG = "train_text_classification.py"
TASK = "text-classification"


@dataclass
class DataArguments(common.DataArguments):
    """Which data: `dataset_name` or `train_file`."""

    train_file: str | None = option(None, ".parquet or .json(l) file with a column of texts and one of labels.")
    validation_file: str | None = option(None, "File to evaluate on, in any of these forms.")
    text_column: str = option("text", "Name of the column of texts.")
    label_column: str = option("label", "Name of the column of labels: class names, words or numbers.")
    max_length: int = option(128, "Tokens of a text, at most: what follows is left out.")


def encode(
    data: DatasetDict, tokenizer: PreTrainedTokenizerBase, labels: dict[str | int, str], args: DataArguments
) -> DatasetDict:
    """Tokens and class numbers. Raises ValueError if a text is missing, or has no token."""
    class_of = {value: index for index, value in enumerate(labels)}

    def encoded(rows: dict) -> dict:
        tokens = tokenizer([each or "" for each in rows[args.text_column]], truncation=True, max_length=args.max_length)
        if not all(tokens["input_ids"]) or None in rows[args.text_column]:
            raise ValueError(f"text_column={args.text_column!r} must have a text in every row, of at least one token")
        return {**tokens, "labels": [class_of[value] for value in rows[args.label_column]]}

    return data.map(encoded, batched=True, remove_columns=data["train"].column_names, desc="tokens")


def head_path(config: PreTrainedConfig) -> str:
    """Path of the linear layer that gives the stock model's logits."""
    with torch.device("meta"):
        plain = backbone_for(config, TASK).make_plain(config)
    base = f"{plain.base_model_prefix}."
    return [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and not name.startswith(base)][-1]


def prepare(
    model_args: ModelArguments, data_args: DataArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    text.check_sources(model_args, data_args)
    if data_args.max_length < 2:
        raise ValueError(f"max_length={data_args.max_length} must be at least 2")
    config = common.plain_config(model_args)
    fields = blocks_fields(model_args, blocks_args, TASK, config)
    common.check_blocks(fields, training_args)
    resume_from = common.checkpoint_to_resume(training_args)
    text.check_length(config, data_args.max_length, "max_length")
    common.check_model(model_args, config, TASK, fields, {"input_ids": torch.zeros(1, 2, dtype=torch.long, device="meta")})

    columns = ("text_column", "label_column")
    data = common.load_data(data_args, columns, lambda: text.read_files(data_args), training_args.seed, ordered=False)
    text.check_texts(data, data_args.text_column)
    own_labels = list(config.id2label.values()) if model_args.model_name_or_path else []
    labels, is_new = settle_labels(config, find_labels(data, data_args.label_column), own_labels)

    tokenizer = text.named_tokenizer(model_args, resume_from, ("eos_token", "sep_token"))
    if tokenizer is None:
        tokenizer = text.trained_tokenizer(data["train"][data_args.text_column], model_args, training_args.process_index == 0)
    text.fit_vocabulary(config, tokenizer, model_args)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id  # a decoder reads a text where its padding begins
    data = encode(data, tokenizer, labels, data_args)
    new_head = head_path(config) if is_new and model_args.model_name_or_path else None
    model = common.load_model(model_args, config, TASK, fields, training_args, new_head)
    trainer_class = common.PlainTrainer if model_args.end_to_end else db.DiffusionBlocksTrainer
    trainer = common.make_trainer(
        trainer_class, model, data_args, training_args, data, DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
        compute_metrics=accuracy,
    )  # fmt: skip
    return trainer, resume_from


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(prepare, (ModelArguments, DataArguments), args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
