"""Fine-tune a language model with TRL's SFTTrainer: whole or by LoRA, and with --stream in the memory of a layer or two.

    accelerate launch recipes/finetune.py --model Qwen/Qwen3-8B --data train.jsonl --stream --learning_rate 1e-5 \\
        --output_dir outputs/tuned

The data are chats (a column `messages`), prompts with completions (`prompt`, `completion`), or texts (`text`). All that
SFTConfig takes is an option, too: `--packing`, `--assistant_only_loss`, `--gradient_accumulation_steps` and so on. `--help`
lists every option; a YAML file sets any of them (`--config FILE.yaml`), and the command line overrides it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import parse
from hf_diffusionblocks.extras import from_extra
from hf_diffusionblocks.recipes import checks, common, streamed_runs, text
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.recipes.files import read_file

with from_extra("trl", "fine-tuning of text", "sft"):
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

PROG = "finetune.py"


@dataclass
class ModelArguments(ModelConfig):
    """TRL's, with shorter names for what everyone sets."""

    model: str = field(kw_only=True, metadata={"help": "Hub id or folder of the model to tune, with its tokenizer."})
    lora: bool = option(False, "Train LoRA adapters, and leave the model as it is; lora_r and the like say which.")
    stream: bool = option(False, common.STREAM)
    keep: str | None = option(None, streamed_runs.KEEP)
    optimizer_in_backward: bool = option(
        False, "Move each weight as soon as its gradient is there, and keep no gradients. Needs max_grad_norm=0."
    )
    model_name_or_path: str | None = field(init=False, default=None)
    use_peft: bool = field(init=False, default=False)

    def __post_init__(self):
        super().__post_init__()
        self.model_name_or_path, self.use_peft = self.model, self.lora
        streamed_runs.check_keep(self.keep, self.stream)
        of_lora = [each for each in fields(ModelConfig) if each.name.startswith(("lora_", "use_rslora", "use_dora"))]
        for each in of_lora:
            if (value := getattr(self, each.name)) != each.default and not self.lora:
                raise ValueError(f"{each.name}={value!r} needs lora")


@dataclass
class DataArguments:
    """What it is tuned on."""

    data: str = field(metadata={"help": f"File ({', '.join(text.READERS)}), or hub id (split train), to train on."})
    eval_data: str | None = option(None, "File, or hub id (split test), to evaluate on at the end (and by eval_strategy).")
    samples: int = option(2, "After training, continue that many prompts of the data, and print what comes.")


def load_rows(source: str, name: str, split: str, text_field: str | None = None) -> Dataset:
    """The rows of a file or hub id.

    Args:
        name: of the argument that names it.
        split: of a hub id.
        text_field: a column of texts that will do, too; None: none does.

    Raises:
        ValueError: they are nothing to tune a model on; names the argument.
    """
    is_file = Path(source).suffix in text.READERS
    rows = read_file(name, source, *text.READERS[Path(source).suffix]) if is_file else load_dataset(source, split=split)
    forms = [{"messages"}, {"prompt", "completion"}, *([{text_field}] if text_field else [])]
    if not any(columns <= {*rows.column_names} for columns in forms):
        texts = f", or a column {text_field!r} (dataset_text_field)" if text_field else ""
        raise ValueError(
            f"{name}={source!r} must have a column 'messages', or columns 'prompt' and 'completion'{texts}; it has "
            f"{', '.join(rows.column_names)}"
        )
    for column in next(columns for columns in forms if columns <= {*rows.column_names}):
        if rows.with_format("arrow")[column][:].null_count:
            raise ValueError(f"{name}={source!r} must have {column!r} in every row: one is null")
    if "messages" in rows.column_names:
        _check_messages(rows.with_format("arrow")["messages"][:], f"{name}={source!r}")
    return rows


def _check_messages(chats: pyarrow.ChunkedArray, given: str) -> None:
    """Raises ValueError if chats are texts, or a message has neither content nor calls of tools: templates write "None" then."""
    if pyarrow.types.is_string(chats.type):
        raise ValueError(f"{given} must have lists of messages in 'messages', and has texts")
    for messages in (chunk.flatten() for chunk in chats.chunks if isinstance(chunk, pyarrow.ListArray)):
        fields = messages.flatten() if pyarrow.types.is_struct(messages.type) else []
        named = {messages.type.field(number).name: field for number, field in enumerate(fields)}
        said = [named[name].is_valid().to_numpy(zero_copy_only=False) for name in ("content", "tool_calls") if name in named]
        if said and not np.logical_or.reduce(said).all():
            raise ValueError(f"{given} must have content in every message: one is null")


def prepare(
    model_args: ModelArguments, data_args: DataArguments, training_args: SFTConfig
) -> tuple[SFTTrainer, list[str | list[dict]], db.LayerStream | None]:
    """The trainer, prompts to continue at the end, and the stream, if there is one."""
    if model_args.optimizer_in_backward:
        db.OptimizerInBackward.check(training_args)
    with training_args.main_process_first(local=False, desc="reading the data"):
        data = load_rows(data_args.data, "data", "train", training_args.dataset_text_field)
        eval_data = data_args.eval_data and load_rows(
            data_args.eval_data, "eval_data", "test", training_args.dataset_text_field
        )
    quantization = get_quantization_config(model_args)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model, revision=model_args.model_revision, dtype=model_args.dtype, quantization_config=quantization,
        attn_implementation=model_args.attn_implementation, trust_remote_code=training_args.trust_remote_code,
        device_map="cpu" if quantization and model_args.stream else None,  # (quantized weights go to the GPU by themselves)
    )  # fmt: skip
    stream = None
    if model_args.stream:
        stream = streamed_runs.stream_keeping(model, model_args.keep, training_args.device)
    trainer = SFTTrainer(
        model, args=training_args, train_dataset=data, eval_dataset=eval_data, peft_config=get_peft_config(model_args),
        callbacks=[db.OptimizerInBackward()] if model_args.optimizer_in_backward else None,
    )  # fmt: skip
    if not len(trainer.train_dataset):
        raise ValueError(f"data={data_args.data!r} has nothing to learn within max_length={training_args.max_length}")
    return trainer, prompts_of(eval_data or data, data_args.samples, training_args.dataset_text_field), stream


def prompts_of(rows: Dataset, num_prompts: int, text_field: str | None = None) -> list[str | list[dict]]:
    """Of the first rows, as many as there are; those that are empty ask nothing."""
    found = (prompt_of(row, text_field) for row in rows.select(range(min(num_prompts, len(rows)))))
    return [prompt for prompt in found if prompt]


def prompt_of(row: dict, text_field: str | None = None) -> str | list[dict]:
    """A row without its answer: what the model is asked in use."""
    if "messages" in row:
        messages = row["messages"]
        return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "assistant" else messages
    return row["prompt"] if "prompt" in row else row[text_field][:60]


@torch.no_grad()
def print_samples(trainer: SFTTrainer, prompts: list[str | list[dict]], num_tokens: int = 48) -> None:
    """The likeliest tokens after each prompt. Every process takes part (with FSDP, each has a part of the weights)."""
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processing_class
    for prompt in prompts:
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        room = getattr(model.config, "max_position_embeddings", None) or num_tokens * 100
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"][:, -(room - num_tokens) :].to(model.device)
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False)
        trainer.accelerator.print(f"\n{prompt} -> {tokenizer.decode(made[0, inputs.shape[1] :], skip_special_tokens=True)}")


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    model_args, data_args, training_args = parse(
        (ModelArguments, DataArguments, SFTConfig), args, prog=PROG, description=__doc__.splitlines()[0]
    )
    try:
        checks.begin(training_args)
        resume_from = common.checkpoint_to_resume(training_args)
        trainer, prompts, stream = prepare(model_args, data_args, training_args)
        checks.check_output(trainer)
    except common.BAD_INPUT as error:
        sys.exit(f"{PROG}: error: {' '.join(str(error).split())}")
    metrics = common.train(trainer, resume_from)
    trainer.create_model_card(dataset_name=None if Path(data_args.data).exists() else data_args.data)
    print_samples(trainer, prompts)
    streamed_runs.print_stream(trainer, stream)
    return metrics


if __name__ == "__main__":
    main()
