"""Train a language model (GPT-2, Llama, Qwen3) block by block (or end to end, for comparison).

    accelerate launch recipes/train_causal_lm.py --config recipes/configs/gutenberg.yaml \\
        --train_file train.parquet --validation_file validation.parquet --output_dir outputs/gutenberg

Starts from a pretrained model (`--model_name_or_path`, weights kept) or a fresh one (`--config_name`); reads a hub data
set, or files of text, parquet or JSON. `--help` lists every option; a YAML file sets any of them, and the command line
overrides it.

After training it prints, of the evaluation text: `eval_loss`, the label-free cross-entropy in nats a token;
`eval_perplexity`, its exponential; `eval_bits_per_byte`, which does not depend on the tokenizer; and, if asked for, the
diffusion's own likelihood bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from transformers import Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, text
from hf_diffusionblocks.recipes.formulation import blocks_fields
from hf_diffusionblocks.recipes.text import DataArguments, Format, ModelArguments

PROG = "train_causal_lm.py"
TASK = "text-generation"


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of sequences. End tokens are labels (HF's collator would take them for padding); first tokens are none:
    nothing predicts them, but the Trainer would count them in the mean for GPT-2."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}


PACKED = Format(text.load_data, partial(text.pack, num_given=1), collate, partial(text.evaluation_text, num_given=1))


class PlainTextTrainer(text.TextTrainer, common.PlainTrainer):
    """Trains the plain model."""


def prepare(
    model_args: ModelArguments, data_args: DataArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    text.check_arguments(model_args, data_args, training_args)
    if data_args.eval_nll_bound and model_args.end_to_end:
        raise ValueError(f"eval_nll_bound={data_args.eval_nll_bound} must be 0 with end_to_end: there is no diffusion")
    config = common.plain_config(model_args)
    fields = blocks_fields(model_args, blocks_args, TASK, config)
    common.check_blocks(fields, training_args)
    resume_from = common.checkpoint_to_resume(training_args)
    text.check_length(config, data_args.sequence_length)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    common.check_model(model_args, config, TASK, fields, {"input_ids": tokens})

    data, tokenizer = text.read(model_args, data_args, training_args, resume_from, PACKED)
    text.fit_vocabulary(config, tokenizer, model_args)
    data = text.encode(data, tokenizer, data_args, training_args, PACKED)
    model = common.load_model(model_args, config, TASK, fields, training_args)
    trainer_class = PlainTextTrainer if model_args.end_to_end else text.BlocksTextTrainer
    return text.make_trainer(trainer_class, model, data_args, training_args, data, PACKED, tokenizer), resume_from


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(prepare, (ModelArguments, DataArguments), args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
