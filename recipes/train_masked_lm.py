"""Train a masked diffusion model of text (BERT, GPT-2, Llama, ...) block by block (or all layers as one block).

    accelerate launch recipes/train_masked_lm.py --config recipes/configs/gutenberg_masked.yaml \\
        --train_file train.parquet --validation_file validation.parquet --output_dir outputs/gutenberg_masked

Starts from a pretrained model (`--model_name_or_path`, weights kept) or a fresh one (`--config_name`), ModernBERT and
Qwen3 among them; reads a hub data set, or files of text, parquet or JSON. `--help` lists every option; a YAML file sets
any of them, and the command line overrides it. A tokenizer without a mask token gets one, which is saved with it.

After training it prints, of the evaluation text: `eval_loss`, the likelihood bound in nats a token, estimated by one
draw of masks a sequence; `eval_perplexity`, its exponential, and `eval_bits_per_byte`, bounds as well; and, if asked for,
the bound by several draws, with its standard error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase, Trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.recipes import common, text
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.formulation import denoiser_fields
from hf_diffusionblocks.recipes.text import DataArguments, Format

logger = logging.getLogger("hf_diffusionblocks.recipes.train_masked_lm")

PROG = "train_masked_lm.py"
TASK = "fill-mask"
MASK = "<|mask|>"  #: for a tokenizer that has none
ENDS = ("eos_token", "sep_token")  #: what may close a document


@dataclass
class ModelArguments(text.ModelArguments):
    end_to_end: bool = option(
        False, "Train all layers as one block, which answers for any share of masks: the usual masked diffusion model."
    )


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of sequences, each token its own label: the model masks by itself."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


PACKED = Format(text.load_data, partial(text.pack, num_given=0), collate, partial(text.evaluation_text, num_given=0))


def set_mask(tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None) -> None:
    """Give a tokenizer its mask token: the one of this number; None leaves its own, or adds one.

    Raises:
        ValueError: there is no token of this number.
    """
    if mask_token_id is not None:
        token = tokenizer.convert_ids_to_tokens(mask_token_id) if 0 <= mask_token_id < len(tokenizer) else None
        if token is None:
            raise ValueError(f"mask_token_id={mask_token_id} must be a token of the tokenizer, 0..{len(tokenizer) - 1}")
        tokenizer.add_special_tokens({"mask_token": token})
    elif tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})


def without_masks(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, column: str) -> DatasetDict:
    """Documents that do not spell the mask token: it is no text to learn."""
    mask = tokenizer.mask_token
    kept = data.filter(lambda document: document is None or mask not in document, input_columns=column)
    for split in data:
        if left_out := len(data[split]) - len(kept[split]):
            logger.warning(f"{left_out} rows of the {split} data are left out: they hold the mask token, {mask!r}")
    return kept


def prepare(
    model_args: ModelArguments, data_args: DataArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    text.check_arguments(model_args, data_args, training_args)
    config = common.plain_config(model_args)
    fields = denoiser_fields(model_args, blocks_args, TASK, config)
    common.check_blocks(fields, training_args)
    resume_from = common.checkpoint_to_resume(training_args)
    text.check_length(config, data_args.sequence_length)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # (Which token is MASK is the tokenizer's to say, below.)
    common.check_model(model_args, config, TASK, fields | {"mask_token_id": None}, {"input_ids": tokens})

    data, tokenizer = text.read(model_args, data_args, training_args, resume_from, PACKED, ENDS)
    text.fit_vocabulary(config, tokenizer, model_args)  # (first: convert adds the row of a new mask token)
    set_mask(tokenizer, blocks_args.mask_token_id)
    with training_args.main_process_first(local=False, desc="looking for mask tokens"):
        data = without_masks(data, tokenizer, data_args.text_column)
    data = text.encode(data, tokenizer, data_args, training_args, PACKED)
    model = common.load_model(model_args, config, TASK, fields | {"mask_token_id": tokenizer.mask_token_id}, training_args)
    return text.make_trainer(text.BlocksTextTrainer, model, data_args, training_args, data, PACKED, tokenizer), resume_from


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(prepare, (ModelArguments, DataArguments), args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
