"""Tune a masked diffusion model of text on answers: prompts are shown and never masked, answers are masked and learned.

    accelerate launch recipes/finetune_masked_lm.py --model outputs/gutenberg_masked --data train.jsonl \\
        --output_dir outputs/masked_chat

The data are chats (a column `messages`, of which each answer is an example with all that was said before it) or prompts
with completions (`prompt`, `completion`, text or messages). The model is one that `train_masked_lm.py` has saved, or a plain
one (BERT, Llama, ...), which is one block unless `--num_blocks` says otherwise. `--help` lists every option; a YAML file sets
any of them (`--config FILE.yaml`), and the command line overrides it.

An answer ends with the tokenizer's end token, and so many more as fill its batch: these are learned, too, so that a text of
a given length can end early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import Dataset, Features
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import BlocksArguments, config_fields
from hf_diffusionblocks.conversion import read_config
from hf_diffusionblocks.diffusion.objectives import IGNORED
from hf_diffusionblocks.processors import load_tokenizer
from hf_diffusionblocks.recipes import answers, common, finetune, text
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.train_masked_lm import TASK, set_mask
from hf_diffusionblocks.saving.resident import checked_blocks

PROG = "finetune_masked_lm.py"
FEATURES = Features({"input_ids": answers.TOKENS, "labels": answers.TOKENS})
COLUMNS = tuple(FEATURES)


@dataclass
class ModelArguments:
    """Which model is tuned."""

    model: str = field(metadata={"help": "Hub id or folder of the model to tune, with its tokenizer."})
    stream: bool = option(False, common.STREAM)


@dataclass
class DataArguments(finetune.DataArguments):
    """What it is tuned on."""

    max_length: int = option(1024, "Tokens of prompt and answer together; longer examples are left out, which is said.")


# ---- examples


def encode(rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """All examples of the rows that are short enough: `input_ids` of prompt and answer, and `labels`, -100 in the prompt.

    Raises:
        ValueError: there is none, or one holds the mask token; names the argument that names the rows.
    """

    def labelled(row: dict) -> dict:
        prompt, answer = row["prompt"], row["answer"]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    made = answers.tokenize(rows, name, tokenizer, max_length)
    made = made.map(labelled, remove_columns=made.column_names, features=FEATURES, desc=f"labels of {name}")
    if len(made.filter(lambda tokens: tokenizer.mask_token_id in tokens, input_columns="input_ids")):
        raise ValueError(f"{name} must not hold the mask token, {tokenizer.mask_token!r}: it is no text to learn")
    return made


def collate(rows: list[dict], end: int) -> dict[str, torch.Tensor]:
    """A batch `[N, S]`: shorter answers go on with end tokens, which are learned."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {name: torch.tensor([row[name] + [end] * (longest - len(row[name])) for row in rows]) for name in COLUMNS}


# ---- model


def load_model(
    source: str, blocks_args: BlocksArguments, train_blocks: list[int] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked model, saved or made of a plain one, and its tokenizer, which has a mask token.

    Args:
        train_blocks: those of a job, which loads no others; None: all.
    """
    config, given = read_config(source), config_fields(blocks_args)
    tokenizer = load_tokenizer(source)
    answers.check_end_token(tokenizer, source)
    is_saved = isinstance(config, db.DiffusionBlocksConfig)
    if is_saved:
        _check_saved(source, config, given, tokenizer)
    given = {"num_blocks": 1, **given}  # (cut into more, later blocks have to learn anew what earlier layers did)
    if train_blocks is not None:
        checked_blocks(train_blocks, config.num_blocks if is_saved else given["num_blocks"], "train_blocks")
    if is_saved:
        model = db.DiffusionBlocksForMaskedLM.from_pretrained(source, resident_blocks=train_blocks)
    else:
        set_mask(tokenizer, given.pop("mask_token_id", None))
        mask = tokenizer.mask_token_id
        model = db.convert(source, task=TASK, resident_blocks=train_blocks, mask_token_id=mask, **given)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # the row of a padding token is not trained, and it may be the end token
    return model, tokenizer


def _check_saved(source: str, config: db.DiffusionBlocksConfig, given: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.task != TASK:
        raise ValueError(f"model={source!r} is for task {config.task!r}, and must be for {TASK!r}")
    if given:
        raise ValueError(f"{', '.join(given)} must not be given: model={source!r} is cut into blocks already")
    if tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"model={source!r} has mask_token_id={config.mask_token_id}, and its tokenizer must have the same, "
            f"not {tokenizer.mask_token_id}"
        )


class PrintAnswers(TrainerCallback):
    """What the model answers to prompts of the data, when it is trained."""

    def __init__(self, trainer: Trainer, prompts: list[str | list[dict]], num_tokens: int = 48):
        self.trainer, self.prompts, self.num_tokens = trainer, prompts, num_tokens

    def on_train_end(self, args, state, control, processing_class=None, **kwargs) -> None:
        model, end = self.trainer.accelerator.unwrap_model(self.trainer.model), text.end_token_id(processing_class)
        for prompt in self.prompts if state.is_world_process_zero else ():
            written, tokens = answers.prompt_tokens(prompt, processing_class)
            room = getattr(model.config, "max_position_embeddings", None) or self.num_tokens * 100
            tokens = torch.tensor([tokens[-(room - self.num_tokens) :]], device=args.device)
            made = model.generate(
                tokens, max_new_tokens=self.num_tokens, eos_token_id=end, temperature=0,
                generator=torch.Generator().manual_seed(args.seed),
            )  # fmt: skip
            answer = processing_class.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
            print(f"\n{written} -> {answer}")


def prepare(
    model_args: ModelArguments, data_args: DataArguments, blocks_args: BlocksArguments,
    training_args: db.DiffusionBlocksTrainingArguments,
) -> tuple[Trainer, str | None]:  # fmt: skip
    """The Trainer, and the checkpoint it resumes from. Everything the user can get wrong is found here."""
    if data_args.max_length < 2:
        raise ValueError(f"max_length={data_args.max_length} must be at least 2")
    resume_from = common.checkpoint_to_resume(training_args)
    sources = {"data": (data_args.data, "train"), "eval_data": (data_args.eval_data, "test")}
    with training_args.main_process_first(local=False, desc="reading the data"):
        rows = {name: finetune.load_rows(source, name, split) for name, (source, split) in sources.items() if source}
    model, tokenizer = load_model(model_args.model, blocks_args, training_args.train_blocks)
    text.check_length(model.config.source_config, data_args.max_length, "max_length")
    data = {name: encode(of, name, tokenizer, data_args.max_length) for name, of in rows.items()}
    if model_args.stream:
        db.stream_layers(model, training_args.device)
    trainer = db.DiffusionBlocksTrainer(
        model=model, args=training_args, train_dataset=data["data"], eval_dataset=data.get("eval_data"),
        data_collator=partial(collate, end=text.end_token_id(tokenizer)), processing_class=tokenizer,
    )  # fmt: skip
    if training_args.train_blocks is None:  # (a job alone answers nothing)
        prompts = finetune.prompts_of(rows.get("eval_data", rows["data"]), data_args.samples)
        trainer.add_callback(PrintAnswers(trainer, prompts))
    return trainer, resume_from


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    return common.run(prepare, (ModelArguments, DataArguments), args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
