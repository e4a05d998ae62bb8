"""Fine-tune a pretrained language model (GPT-2, Llama, Qwen3) block by block, whole or by LoRA.

    accelerate launch recipes/finetune_causal_lm.py --model_name_or_path openai-community/gpt2 --peft lora \\
        --train_file train.parquet --updates_per_block 500 --learning_rate 1e-3 \\
        --output_dir outputs/tuned --export_plain outputs/plain

The data are text (`--text_column`), prompts with completions (`--prompt_column`, `--completion_column`) or chats
(`--messages_column`), of a hub data set or of parquet, JSON or text files. Of prompts and chats, only what the
assistant writes has a loss; both go through the tokenizer's chat template, if it has one. `--help` lists every option;
a YAML file sets any of them, and the command line overrides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, completions, finetuning, text, train_causal_lm
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.finetuning import FinetuningArguments, not_an_option
from hf_diffusionblocks.recipes.formulation import blocks_fields

PROG = "finetune_causal_lm.py"


@dataclass
class ModelArguments(text.ModelArguments):
    """Which model: `model_name_or_path`."""

    tokenizer_name: str | None = option(None, "Hub id or folder of the tokenizer. Default: the model's.")
    config_name: str | None = not_an_option()
    config_overrides: str | None = not_an_option()
    vocab_size: int = not_an_option(4096)


@dataclass
class DataArguments(text.DataArguments):
    """Which data: `dataset_name` or `train_file`, and which of their columns."""

    prompt_column: str | None = option(None, "Name of the column of prompts; needs completion_column.")
    completion_column: str | None = option(None, "Name of the column of what follows a prompt.")
    messages_column: str | None = option(
        None, "Name of the column of chats: lists of messages with 'role' and 'content'."
    )


def check_data(args: DataArguments) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    prompts = [args.prompt_column, args.completion_column]
    if any(prompts) and not all(prompts):
        raise ValueError(f"prompt_column={prompts[0]!r} and completion_column={prompts[1]!r} must be set together")
    if any(prompts) and args.messages_column:
        raise ValueError(f"messages_column={args.messages_column!r} and prompt_column={prompts[0]!r}: set one of them")
    if (any(prompts) or args.messages_column) and args.eval_nll_bound:
        raise ValueError(f"eval_nll_bound={args.eval_nll_bound} must be 0 with prompts or chats: it is of whole texts")


def prepare(
    model_args: ModelArguments, data_args: DataArguments, tuning: FinetuningArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    finetuning.check_source(model_args)
    config = common.plain_config(model_args)
    fields = blocks_fields(model_args, blocks_args, training_args, "text-generation", config)
    finetuning.check_arguments(model_args, tuning, fields, training_args)
    check_data(data_args)
    instructions = data_args.prompt_column or data_args.messages_column
    return train_causal_lm.prepare(
        model_args, data_args, blocks_args, training_args,
        data_format=completions.FORMAT if instructions else train_causal_lm.PACKED,
        adapt=partial(finetuning.adapt, tuning=tuning) if tuning.peft else None,
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
