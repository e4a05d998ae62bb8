"""`diffusionblocks convert`: a plain model or config becomes a saved DiffusionBlocks model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import CONFIG_NAME

from ..configuration import DiffusionBlocksConfig, option
from ..conversion import convert, read_config
from ..models.base import DiffusionBlocksPreTrainedModel
from ..saving import shards
from ..tasks import TASKS, task_of
from .arguments import BlocksArguments, config_fields, parse_verb
from .inspect import block_table, describe


@dataclass
class ConvertArguments:
    task: str | None = option(None, "What the model is for, as in pipeline(task). Not given: the architecture's usual task.")
    fresh: bool = option(False, "Take SOURCE's config alone: all weights are fresh.")
    seed: int = option(0, "Of fresh weights: all with --fresh, else those that the plain model lacks.")
    overwrite: bool = option(False, "Replace the model that OUT_DIR holds.")


def run(args: list[str]) -> None:
    options, blocks, source, out_dir = parse_verb(
        "convert",
        [ConvertArguments, BlocksArguments],
        {
            "SOURCE": "hub id or folder of a plain model, or its config JSON file (with --fresh)",
            "OUT_DIR": "folder for the DiffusionBlocks model",
        },
        args,
        description="Cut a plain model into blocks, save it with its tokenizer or image processor, print its blocks.",
    )
    _check_out_dir(Path(out_dir), Path(source), options.overwrite)
    if not options.fresh:
        _check_weights(Path(source))
    set_seed(options.seed)
    model = _convert(source, options, config_fields(blocks))
    model.save_pretrained(out_dir)
    _copy_processor(model.task, source, out_dir)
    print(block_table(describe(out_dir)))


def _check_out_dir(out_dir: Path, source: Path, overwrite: bool) -> None:
    shards.finish_interrupted_save(out_dir)
    if out_dir.resolve() == source.resolve():
        raise ValueError(f"OUT_DIR={out_dir} must not be SOURCE: the plain model would be lost")
    if out_dir.exists() and not out_dir.is_dir():
        raise NotADirectoryError(f"OUT_DIR={out_dir} is not a folder")
    if (out_dir / CONFIG_NAME).exists() and not overwrite:
        raise ValueError(f"OUT_DIR={out_dir} holds a model already: --overwrite replaces it")


def _check_weights(source: Path) -> None:
    if source.is_file() or (source.is_dir() and not any(source.glob("*.safetensors"))):
        raise ValueError(f"SOURCE={source} has no safetensors weights: --fresh takes its config alone")


def _convert(source: str, options: ConvertArguments, fields: dict) -> DiffusionBlocksPreTrainedModel:
    fields = {"task": options.task, **fields}
    try:
        if not options.fresh:
            return convert(source, **fields)
        config = read_config(source)
        if not isinstance(config, DiffusionBlocksConfig):  # (which is refused)
            fields = task_of(config, options.task).fields_of_source(_beside(source)) | fields
        return convert(config, **fields)
    except (OSError, SafetensorError) as error:  # "header too large", "couldn't connect": of what?
        raise OSError(f"SOURCE={source}: {error}") from error


def _beside(source: str) -> str:
    """Where a source's processor is: of a config file, beside it, as the Auto classes would read the file itself."""
    return str(Path(source).parent) if Path(source).is_file() else source


def _copy_processor(task: str, source: str, out_dir: str) -> None:
    """What pipelines need beside the model."""
    row = TASKS[task]
    if row.load_processor is None:
        return
    try:
        row.load_processor(_beside(source)).save_pretrained(out_dir)
    except (ImportError, OSError) as error:
        reason = str(error).strip().partition(". ")[0]  # without advice on the hub
        print(f"diffusionblocks convert: note: no {row.processor} was copied: {reason}", file=sys.stderr)
