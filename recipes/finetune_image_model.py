"""Fine-tune an image model of diffusers on captioned images: whole or by LoRA, with --stream in the memory of a layer or two.

    accelerate launch recipes/finetune_image_model.py --model Qwen/Qwen-Image --data images/train --stream --lora \\
        --learning_rate 1e-4 --output_dir outputs/style

Any text-to-image or class-to-image pipeline whose denoiser is a transformer. Latents and embeddings of prompts are computed
once, and kept on disk; then the transformer alone is there. All that TrainingArguments takes is an option, too. `--help` lists
every option; a YAML file sets any of them (`--config FILE.yaml`), and the command line overrides it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageColumn
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig
from transformers import TrainingArguments, set_seed

import hf_diffusionblocks as db
from hf_diffusionblocks.extras import from_extra
from hf_diffusionblocks.recipes import common, streamed_runs
from hf_diffusionblocks.recipes.common import option

with from_extra("diffusers", "fine-tuning of image models", "diffusers"):
    from diffusers.training_utils import cast_training_params, free_memory

from hf_diffusionblocks.recipes.image_cache import (
    Cache, CachedImages, Row, bucket_sizes, fingerprint, plan_rows, read, without_prompt, write,
)  # fmt: skip
from hf_diffusionblocks.recipes.image_folders import pipeline_class, pipeline_folder, read_index, taken, transformer_class
from hf_diffusionblocks.recipes.image_pipelines import WatchedPipeline
from hf_diffusionblocks.recipes.image_trainer import WEIGHTINGS, ImageTrainer, Objective, Samples, check_checkpoint

PROG = "finetune_image_model.py"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ModelArguments:
    """Which model, and what of it is trained."""

    model: str = field(metadata={"help": "Hub id or folder of a pipeline of diffusers whose denoiser is a transformer."})
    dtype: str = option("bfloat16", "Of all weights but the VAE's and the adapters': float32 or bfloat16.")
    lora: bool = option(False, "Train LoRA adapters, and leave the model as it is.")
    lora_r: int = option(16, "Rank of the adapters; their scale is 1.")
    lora_layers: str = option(
        "to_k,to_q,to_v,to_out.0", "With lora: which matrices have an adapter, as ends of their names in the transformer."
    )
    stream: bool = option(False, common.STREAM)
    keep: str | None = option(None, streamed_runs.KEEP)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be {' or '.join(map(repr, DTYPES))}")
        if self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r} must be at least 1")
        streamed_runs.check_keep(self.keep, self.stream)


@dataclass
class DataArguments:
    """What it is tuned on."""

    data: str = field(
        metadata={"help": "Folder of images with a metadata.jsonl (file_name, text), parquet file, or hub id (split train)."}
    )
    image_column: str = option("image", "Column of images.")
    caption_column: str = option("text", "Column of captions; of a class-to-image model, of numbers of classes.")
    resolution: int = option(1024, "Images are given about that many pixels, squared.")
    aspect_buckets: bool = option(True, "Give an image the size whose shape is nearest to its own; false: all are squares.")
    bucket_step: int = option(64, "Heights and widths are multiples of it.")
    caption_dropout: float = option(0.0, "Share of the images that train without their caption, for guidance.")
    max_sequence_length: int | None = option(None, "Most tokens of a caption. Not given: the pipeline's own.")
    embedded_guidance: float = option(3.5, "Guidance that a guidance-distilled model (FLUX.1-dev) is told in training.")
    cache_dir: str | None = option(None, "Folder of latents and embeddings. Not given: _cache, in output_dir.")
    cache_batch_size: int = option(8, "Prompts that are encoded together; each time, streamed encoders are copied once.")

    def __post_init__(self):
        for name in ("resolution", "bucket_step", "cache_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.bucket_step > self.resolution:
            raise ValueError(f"bucket_step={self.bucket_step} must be at most resolution={self.resolution}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be from 0 to below 1")


@dataclass
class LossArguments:
    """Which noise levels are drawn, and how they are weighted: as in diffusers' training scripts."""

    weighting_scheme: str = option("none", f"Of flow matching: {', '.join(WEIGHTINGS)}.")
    logit_mean: float = option(0.0, "Of weighting_scheme=logit_normal.")
    logit_std: float = option(1.0, "Of weighting_scheme=logit_normal.")
    mode_scale: float = option(1.29, "Of weighting_scheme=mode.")
    snr_gamma: float | None = option(None, "Of models that predict noise or v: min-SNR weighting, with this gamma (5.0).")

    def __post_init__(self):
        if self.weighting_scheme not in WEIGHTINGS:
            raise ValueError(f"weighting_scheme={self.weighting_scheme!r} must be one of {', '.join(WEIGHTINGS)}")


@dataclass
class SampleArguments:
    """Pictures while it trains, by the stock pipeline."""

    sample_prompts: list[str] | None = option(None, "What is drawn (or numbers of classes). Not given: the first captions.")
    num_samples: int = option(4, "Of the first captions, how many are drawn; 0: nothing is.")
    sample_every_n_steps: int = option(0, "Draw a grid every that many optimizer steps; 0: at the end alone.")
    sample_steps: int | None = option(None, "Denoising steps of a sample. Not given: the pipeline's own.")

    def __post_init__(self):
        for name in ("num_samples", "sample_every_n_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """The stock ones, and averages of the weights."""

    ema_decay: float | None = option(
        None, "Keep averages (EMA) of the trained weights, each where its weight is, for samples and what is saved in the end."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be above 0 and below 1")
        self.remove_unused_columns = False


def load_images(args: DataArguments) -> Dataset:
    """Rows with an image and a caption. Raises ValueError, naming the argument, if they are not there."""
    path = Path(args.data)
    try:
        if path.suffix == ".parquet":
            data = load_dataset("parquet", data_files=args.data, split="train")
        elif path.is_dir():
            # (All of the folder: left to itself, `datasets` takes a file named "test-shot.png" for another split.)
            data = load_dataset("imagefolder", data_files=f"{args.data}/**", split="train")
        else:
            data = load_dataset(args.data, split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"data={args.data!r} cannot be read: {error.__cause__}") from None
    for name in ("image_column", "caption_column"):
        if (column := getattr(args, name)) not in data.column_names:
            hint = " (of a folder: metadata.jsonl has it)" if name == "caption_column" else ""
            raise ValueError(
                f"{name}={column!r} must be a column of data={args.data!r}{hint}: it has {', '.join(data.column_names)}"
            )
    return data.cast_column(args.image_column, ImageColumn(decode=False))


def check_drawn(drawn: Sequence, takes: str, name: str) -> None:
    """Raises ValueError if these are not what the pipeline takes."""
    kind, called = (str, "texts") if takes == "prompt" else (int, "numbers of classes")
    for number, each in enumerate(drawn):
        if each is None or (isinstance(each, str) and not each.strip()):
            raise ValueError(f"{name} is empty in row {number}: every image must have one")
        if not isinstance(each, kind) or isinstance(each, bool):
            raise ValueError(f"{name} must have {called}, not {each!r}: the pipeline takes {takes}")


def sample_calls(args: SampleArguments, data_args: DataArguments, takes: str, rows: Sequence[Row], index: dict) -> list[dict]:
    """Arguments of the stock pipeline for each sample; its own defaults else."""
    drawn = args.sample_prompts
    if drawn is None:
        drawn = list(dict.fromkeys(row.drawn for row in rows))[: args.num_samples]
    elif takes == "class_labels":
        drawn = [int(each) if each.isdigit() else each for each in drawn]
    check_drawn(drawn, takes, "sample_prompts")
    accepts = inspect.signature(pipeline_class(index).__call__).parameters
    side = data_args.resolution // data_args.bucket_step * data_args.bucket_step
    given = {
        "height": side, "width": side, "num_inference_steps": args.sample_steps, "use_resolution_binning": False,
        "max_sequence_length": data_args.max_sequence_length,
        # (Pipelines with a guidance of this name are guided only away from a prompt that is given.)
        "negative_prompt": " " if "true_cfg_scale" in accepts else None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if name in accepts and value is not None}
    return [given | {takes: each if takes == "prompt" else [each]} for each in drawn]


def fill_cache(
    cache: Cache, rows: Sequence[Row], data: Dataset, calls: Sequence[dict], folder: str, model_args: ModelArguments,
    args: DataArguments, device: torch.device,
) -> list[list]:  # fmt: skip
    """Compute what is not on disk yet, by the pipeline's own parts, which are gone afterwards.

    Returns:
        What the pipeline's `encode_prompt` returns in each call of a sample.
    """
    files = [cache.file_of("sample", call) for call in calls]
    if cache.missing(rows) or not all(file.is_file() for file in files):
        pipeline = WatchedPipeline(folder, DTYPES[model_args.dtype], device)
        for encoder in pipeline.encoders:
            db.stream_layers(encoder, device) if model_args.stream else encoder.to(device)
        options = {"guidance_scale": args.embedded_guidance, "max_length": args.max_sequence_length}
        cache.fill(rows, data, args.image_column, pipeline, options, args.cache_batch_size)
        for file, call in zip(files, calls):
            if not file.is_file():
                write(file, pipeline.encodings(call))
        del pipeline
        free_memory()
    return [read(file) for file in files]


def add_adapters(transformer: torch.nn.Module, args: ModelArguments) -> None:
    """As diffusers' scripts do: in float32, over a model that stays as it is."""
    transformer.requires_grad_(False)
    targets = args.lora_layers.replace(" ", "").split(",")
    transformer.add_adapter(
        LoraConfig(r=args.lora_r, lora_alpha=args.lora_r, init_lora_weights="gaussian", target_modules=targets)
    )
    cast_training_params(transformer, torch.float32)


def check_trained(folder: str, index: dict, args: ModelArguments, resume_from: str | None) -> None:
    """Before any work: raises ValueError if there is nothing that adapters would be of, or a checkpoint is of other things."""
    kind = transformer_class(index)
    with torch.device("meta"):
        transformer = kind.from_config(kind.load_config(folder, subfolder="transformer"))
        if args.lora:
            add_adapters(transformer, args)
    if resume_from is not None:
        check_checkpoint(resume_from, transformer)


def make_transformer(
    folder: str, index: dict, model_args: ModelArguments, training_args: ImageTrainingArguments
) -> tuple[torch.nn.Module, db.LayerStream | None]:
    """What is trained, and its stream."""
    set_seed(training_args.seed)  # adapters start as they do where the cache was filled before
    transformer = transformer_class(index).from_pretrained(
        folder, subfolder="transformer", dtype=DTYPES[model_args.dtype], use_safetensors=True
    )
    if model_args.lora:
        add_adapters(transformer, model_args)
    stream = None
    if model_args.stream:
        stream = streamed_runs.stream_keeping(transformer, model_args.keep, training_args.device)
    return transformer, stream


def prepare(
    model_args: ModelArguments, args: DataArguments, loss_args: LossArguments, sample_args: SampleArguments,
    training_args: ImageTrainingArguments,
) -> tuple[ImageTrainer, str | None, db.LayerStream | None]:  # fmt: skip
    """The trainer, the checkpoint it resumes from, and the stream, if there is one."""
    resume_from = common.checkpoint_to_resume(training_args)
    with training_args.main_process_first(local=False, desc="computing latents and embeddings"):
        folder = pipeline_folder(model_args.model)
        index = read_index(folder)
        takes = taken(index)
        if model_args.lora and not hasattr(pipeline_class(index), "save_lora_weights"):
            raise ValueError(f"lora must not be set: {index['_class_name']} loads no adapters")
        if args.caption_dropout and takes != "prompt":
            raise ValueError(f"caption_dropout={args.caption_dropout} must be 0: this transformer hides classes by itself")
        objective = Objective(json.loads(Path(folder, "scheduler", "scheduler_config.json").read_text()), loss_args)
        check_trained(folder, index, model_args, resume_from)

        data = load_images(args)
        check_drawn(data[args.caption_column], takes, f"caption_column={args.caption_column!r}")
        sizes = bucket_sizes(args.resolution, args.bucket_step, args.aspect_buckets and takes == "prompt")
        rows = plan_rows(data, args.image_column, args.caption_column, sizes)
        cached = rows + ([without_prompt(size) for size in {row.size for row in rows}] if args.caption_dropout else [])
        calls = sample_calls(sample_args, args, takes, rows, index)
        cache = Cache(
            # (push_to_hub leaves out what begins with "_": images can be read from their latents.)
            args.cache_dir or Path(training_args.output_dir, "_cache"),
            {"fingerprint": fingerprint(folder), "dtype": model_args.dtype, "max_sequence_length": args.max_sequence_length,
             "embedded_guidance": args.embedded_guidance},
        )  # fmt: skip
        encodings = fill_cache(cache, cached, data, calls, folder, model_args, args, training_args.device)
    transformer, stream = make_transformer(folder, index, model_args, training_args)
    trainer = ImageTrainer(
        transformer, DTYPES[model_args.dtype], training_args, CachedImages(cache, rows), objective, pipeline_class(index),
        args.caption_dropout,
    )  # fmt: skip
    if calls:
        trainer.add_callback(Samples(trainer, folder, calls, encodings, sample_args.sample_every_n_steps))
    return trainer, resume_from, stream


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    types = (ModelArguments, DataArguments, LossArguments, SampleArguments, ImageTrainingArguments)
    return streamed_runs.run_streamed(prepare, types, args, PROG, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
