"""Tune a block diffusion model of Transformers (DiffusionGemma) on answers; with --stream in the memory of a layer or two.

    accelerate launch recipes/finetune_block_diffusion.py --model google/diffusiongemma-26B-A4B-it --data train.jsonl \\
        --stream --dtype bfloat16 --learning_rate 1e-5 --output_dir outputs/tuned

The data are chats (a column `messages`, of which each answer is an example) or prompts with completions (`prompt`,
`completion`). Images are not trained. `--help` lists every option; a YAML file sets any of them (`--config FILE.yaml`), and the
command line overrides it.

The model writes a text canvas by canvas: its encoder reads all that is before, its decoder turns a canvas of random tokens into
text, in steps. Its class has no loss; this recipe's is in `canvas_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset, Features
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoProcessor, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase, ProcessorMixin, Trainer,
    TrainerCallback, TrainingArguments,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.conversion import read_config
from hf_diffusionblocks.diffusion.randomness import seeded
from hf_diffusionblocks.memory.estimate import DTYPES
from hf_diffusionblocks.processors import load_tokenizer
from hf_diffusionblocks.recipes import answers, common, finetune, streamed_runs, text
from hf_diffusionblocks.recipes.common import option

PROG = "finetune_block_diffusion.py"
FEATURES = Features({"input_ids": answers.TOKENS, "labels": answers.TOKENS})


@dataclass
class ModelArguments:
    """Which model is tuned, and what of it."""

    model: str = field(metadata={"help": "Hub id or folder of the model to tune, with its tokenizer."})
    dtype: str = option("float32", f"Of the weights that are trained: {', '.join(DTYPES)}.")
    stream: bool = option(False, common.STREAM)
    keep: str | None = option(None, streamed_runs.KEEP)

    def __post_init__(self):
        streamed_runs.check_keep(self.keep, self.stream)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")


@dataclass
class DataArguments(finetune.DataArguments):
    """What it is tuned on."""

    max_length: int = option(1024, "Tokens of prompt and answer together; longer examples are left out, which is said.")
    self_conditioning: float = option(0.5, "Share of the rows that are shown what the model made of them before.")

    def __post_init__(self):
        if not 0 <= self.self_conditioning <= 1:
            raise ValueError(f"self_conditioning={self.self_conditioning} must be from 0 to 1")


# ---- the loss


def noised(tokens: torch.Tensor, shares: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A canvas on its way: each token is a uniform draw of the vocabulary with its row's probability.

    Args:
        tokens: `[N, C]`.
        shares: `[N]`, in [0, 1]; 1 is where `generate` starts.
    """
    drawn = torch.rand(tokens.shape, device=tokens.device) < shares[:, None]
    return torch.where(drawn, torch.randint_like(tokens, vocab_size), tokens)


def shares_of(rows: int, device: torch.device) -> torch.Tensor:
    """A share of noise for each row, each uniform in [0, 1); together spread evenly, so that batches differ less."""
    return (torch.rand((), device=device) + torch.arange(rows, device=device) / rows) % 1


def canvas_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy of every token of a canvas, noised or not, in nats a token.

    The sampler draws all tokens in each step, keeps those it is surest of, and draws the others anew from all that there are: it
    never says which are kept. So the decoder shall know each token's distribution given the canvas and what is before it. That is
    where this loss is least, for any share of noise; it is no bound of a likelihood.

    Args:
        outputs: of the model, for a canvas made by [`noised`].
        labels: `[N, C]`, the canvas without noise.
        num_items_in_batch: tokens of all canvases of the optimizer's step; None: those of this batch.
    """
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / (
        labels.numel() if num_items_in_batch is None else num_items_in_batch
    )


class CanvasTrainer(Trainer):
    """The stock Trainer, which noises canvases. Evaluation draws the same noise each time.

    Args:
        self_conditioning: the share of rows for which the model first makes something of the canvas, without gradient, and then
            is shown it, as in the sampler's steps but its first. (There, logits are sharpened by a temperature, too.)
    """

    def __init__(self, *args, self_conditioning: float = 0.5, **kwargs):
        super().__init__(*args, compute_loss_func=canvas_loss, **kwargs)
        self._self_conditioning = self_conditioning

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        clean = inputs["labels"]
        # (Processes have one seed: they draw the same number, and from it each its own noise.)
        with seeded([torch.randint(2**31, ()).item(), self.args.process_index], clean.device):
            shares = shares_of(len(clean), clean.device)
            canvas = noised(clean, shares, self.model.config.get_text_config().vocab_size)
            shown = torch.rand(len(clean), device=clean.device) < self._self_conditioning
        inputs = {**inputs, "decoder_input_ids": canvas}
        if self._self_conditioning:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad():
                inputs["self_conditioning_logits"] = model(**given).logits
            inputs["self_conditioning_mask"] = shown
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, *args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)


# ---- examples


def encode(rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, canvas_length: int) -> Dataset:
    """A row for each canvas of an answer: `input_ids` are all tokens before it, `labels` the canvas.

    An answer's last canvas goes on with end tokens, which are learned.

    Raises:
        ValueError: no answer fits, or one has no prompt; names the argument that names the rows.
    """
    end = text.end_token_id(tokenizer)

    def of_batch(batch: dict[str, list]) -> dict[str, list]:
        made = {"input_ids": [], "labels": []}
        for prompt, answer in zip(batch["prompt"], batch["answer"]):
            for start in range(0, len(answer), canvas_length):
                canvas = answer[start : start + canvas_length]
                made["input_ids"].append(prompt + answer[:start])
                made["labels"].append(canvas + [end] * (canvas_length - len(canvas)))
        return made

    made = answers.tokenize(rows, name, tokenizer, max_length)
    if not all(made.map(lambda row: {"asked": len(row["prompt"]) > 0}, remove_columns=made.column_names)["asked"]):
        raise ValueError(f"{name} must have prompts of at least one token: the encoder cannot read nothing")
    return made.map(of_batch, batched=True, remove_columns=made.column_names, features=FEATURES, desc=f"canvases of {name}")


class Collate:
    """Batches of canvases; what is before them is padded on its left, as `generate` wants it.

    Args:
        padding: a token.
    """

    def __init__(self, padding: int):
        self._padding = padding

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        missing = [longest - len(row["input_ids"]) for row in rows]
        seen = torch.tensor([[0] * short + [1] * (longest - short) for short in missing])
        labels = torch.tensor([row["labels"] for row in rows])
        tokens = [[self._padding] * short + row["input_ids"] for short, row in zip(missing, rows)]
        return {
            "input_ids": torch.tensor(tokens), "attention_mask": seen, "labels": labels,
            "decoder_attention_mask": torch.cat([seen, torch.ones_like(labels)], 1),
        }  # fmt: skip


# ---- model


def load_model(args: ModelArguments, device: torch.device) -> tuple[nn.Module, db.LayerStream | None]:
    """The model, whose parts for images are frozen, and its stream."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(args.model, dtype=DTYPES[args.dtype], use_safetensors=True)
    for name, part in model.model.encoder.named_children():
        part.requires_grad_(name == "language_model")
    return model, streamed_runs.stream_keeping(model, args.keep, device) if args.stream else None


def load_processor(source: str, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | PreTrainedTokenizerBase:
    """What is saved beside the model: the tokenizer, with what reads images where the model has that."""
    try:
        return AutoProcessor.from_pretrained(source)
    except OSError:
        return tokenizer


def check_model(source: str) -> DiffusionGemmaConfig:
    """The config of a model that this recipe can tune.

    Raises:
        ValueError: it is of another kind; says which recipe is for it, if one is.
    """
    config = read_config(source)
    if not isinstance(config, DiffusionGemmaConfig):
        raise ValueError(
            f"model={source!r} has model_type={config.model_type!r}, and must have 'diffusion_gemma', the one block diffusion "
            "model that Transformers has. Masked models: finetune_masked_lm.py; causal ones: finetune.py"
        )
    return config


class PrintAnswers(TrainerCallback):
    """What the model's own sampler answers to prompts of the data, when it is trained."""

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, prompts: list[str | list[dict]]):
        self.trainer, self.tokenizer, self.prompts = trainer, tokenizer, prompts

    def on_train_end(self, args, state, control, **kwargs) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model).eval()
        for prompt in self.prompts if state.is_world_process_zero else ():
            written, tokens = answers.prompt_tokens(prompt, self.tokenizer)
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                made = model.generate(torch.tensor([tokens], device=args.device), max_new_tokens=model.config.canvas_length)
            print(f"\n{written} -> {self.tokenizer.decode(made.sequences[0, len(tokens) :], skip_special_tokens=True)}")


def prepare(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[CanvasTrainer, str | None, db.LayerStream | None]:
    """The trainer, the checkpoint it resumes from, and the stream, if there is one."""
    resume_from = common.checkpoint_to_resume(training_args)
    config, tokenizer = check_model(model_args.model), load_tokenizer(model_args.model)
    answers.check_end_token(tokenizer, model_args.model)
    text.check_length(config.get_text_config(), data_args.max_length, "max_length")
    sources = {"data": (data_args.data, "train"), "eval_data": (data_args.eval_data, "test")}
    with training_args.main_process_first(local=False, desc="reading the data"):
        rows = {name: finetune.load_rows(source, name, split) for name, (source, split) in sources.items() if source}
        data = {name: encode(of, name, tokenizer, data_args.max_length, config.canvas_length) for name, of in rows.items()}
    model, stream = load_model(model_args, training_args.device)
    training_args.label_names = ["labels"]  # (the model's forward takes none, so the Trainer would not find them)
    training_args.remove_unused_columns = False
    padding = text.end_token_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = CanvasTrainer(
        model, training_args, Collate(padding), data["data"], data.get("eval_data"),
        processing_class=load_processor(model_args.model, tokenizer), self_conditioning=data_args.self_conditioning,
    )  # fmt: skip
    prompts = finetune.prompts_of(rows.get("eval_data", rows["data"]), data_args.samples)
    trainer.add_callback(PrintAnswers(trainer, tokenizer, prompts))
    return trainer, resume_from, stream


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    types = (ModelArguments, DataArguments, TrainingArguments)
    return streamed_runs.run_streamed(prepare, types, args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
