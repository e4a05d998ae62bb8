"""`diffusionblocks inspect`: what a saved model's blocks hold, from its config, index and file headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_url,
    parse_local_safetensors_file_metadata,
    try_to_load_from_cache,
)
from huggingface_hub.utils import SafetensorsFileMetadata
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from ..configuration import DiffusionBlocksConfig, USER_FIELDS, option
from ..models.targets import FixedTargets
from ..saving import shards
from ..tasks import TASKS
from .arguments import parse_verb


@dataclass
class InspectArguments:
    json: bool = option(False, "Print JSON.")


def run(args: list[str]) -> None:
    options, source = parse_verb(
        "inspect",
        [InspectArguments],
        {"PATH_OR_ID": "folder or hub id of a DiffusionBlocks model"},
        args,
        description="Print what a saved model's blocks hold. Reads its config, index and file headers, no weights.",
    )
    description = describe(source)
    if options.json:
        print(json.dumps(description, indent=2))
    else:
        report = description["training_report"]
        formulation = _lines({"formulation": description["formulation"]})
        trained = _lines({"training report": report}) if report else ["not trained yet"]
        print("\n\n".join([block_table(description), "\n".join(formulation), "\n".join(trained)]))


def read_config(source: str) -> DiffusionBlocksConfig:
    """The config of a saved DiffusionBlocks model.

    Raises:
        ValueError: it is the config of another model.
        OSError: there is none.
    """
    if Path(source).is_dir():
        shards.finish_interrupted_save(Path(source))
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:  # "couldn't connect": for what?
        raise OSError(f"{source}: {error}") from error
    if not isinstance(config, DiffusionBlocksConfig):
        raise ValueError(
            f"{source} is not a DiffusionBlocks model (model_type={config.model_type!r}): "
            "`diffusionblocks convert` makes one of it"
        )
    return config


def describe(source: str) -> dict:
    """What is known of a saved model without its weights; JSON-able.

    Raises:
        ValueError: it is no DiffusionBlocks model, or its index does not fit its config.
        OSError: a file is missing, truncated or damaged; names it.
    """
    config = read_config(source)
    index = _index(source, config)
    if Path(source).is_dir():
        shards.check_shards(Path(source))
    contents = {block: _contents(source, file, index.weight_map) for block, file in index.files.items()}
    model_class = TASKS[config.task].model_class
    schedule = model_class.schedule_for(config)
    return {
        "model": source,
        "source_model_type": config.source_config.model_type,
        "base_model": config.base_model,
        "task": config.task,
        "level": schedule.level_name if schedule else None,
        "num_hidden_layers": config.num_hidden_layers,
        "num_blocks": config.num_blocks,
        "blocks": [
            {
                "block": k,
                "layers": list(config.block_layers(k)),
                **_levels(schedule, k),
                **contents[str(k)],
            }
            for k in range(config.num_blocks)
            if str(k) in contents  # the model of a job holds some blocks only
        ],
        "shared": contents.get("shared"),  # None where each block has its own
        "formulation": {
            name: value
            for name in USER_FIELDS
            if name not in ("num_blocks", "layers_per_block") and (value := getattr(config, name)) is not None
        },
        "training_report": config.training_report,
    }


def _levels(schedule, block_index: int) -> dict[str, list[float]]:
    """A block's own range of noise levels, and the one that it trains at, where there is noise."""
    if schedule is None:
        return {}
    name = schedule.level_name
    own, widened = schedule.interval(block_index), schedule.interval(block_index, schedule.overlap)
    return {name: list(own), f"training_{name}": list(widened)}


def _index(source: str, config: DiffusionBlocksConfig) -> shards.Index:
    """What the index says, which maps the blocks of this config, or some of them, to files."""
    path = Path(cached_file(source, SAFE_WEIGHTS_INDEX_NAME))
    index = shards.read_index(path)
    if index.files is None:
        raise ValueError(f"{path} does not map blocks to files")
    blocks = index.files.keys() - {"shared"}
    if not blocks or not blocks <= set(map(str, range(config.num_blocks))):
        raise ValueError(f"{path} maps {', '.join(sorted(index.files))}, but the config says num_blocks={config.num_blocks}")
    return index


def _contents(source: str, file: str, weight_map: Mapping[str, str]) -> dict:
    """Parameters and bytes of one file, which holds what the index says."""
    path = Path(source) / file if Path(source).is_dir() else try_to_load_from_cache(source, file)
    if isinstance(path, (str, Path)):
        header, size = parse_local_safetensors_file_metadata(path), Path(path).stat().st_size
    else:
        header, size = _remote_header(source, file)
    shards.check_names(file if path is None else path, header.tensors, weight_map)
    shapes = (tensor.shape for name, tensor in header.tensors.items() if not name.endswith(FixedTargets.SUFFIX))
    return {"parameters": sum(map(math.prod, shapes)), "file": file, "bytes": size}


def _remote_header(repo_id: str, file: str) -> tuple[SafetensorsFileMetadata, int]:
    """Header and size of a file on the hub, without downloading the rest."""
    try:
        header = HfApi().parse_safetensors_file_metadata(repo_id, file)
        return header, get_hf_file_metadata(hf_hub_url(repo_id, file)).size
    except Exception as error:  # the hub client lets through whatever its HTTP library raises
        raise OSError(f"{repo_id}: the header of {file} cannot be read: {error}") from error


def block_table(description: dict) -> str:
    """A model's blocks as a table, from [`describe`]."""
    level = description["level"]
    levels = (level, f"trains at {level}") if level else ()
    header = ("block", "layers", *levels, "parameters", "file", "bytes")
    parts = list(description["blocks"])
    if description["shared"]:
        parts.append({"block": "shared", **description["shared"]})
    total = {key: sum(part[key] for part in parts) for key in ("parameters", "bytes")}
    parts.append({"block": "total", "file": "", **total})
    rows = [header, *(_block_row(part, level) for part in parts)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    title = (
        f"{description['model']}: {description['source_model_type']} for {description['task']}, "
        f"{description['num_hidden_layers']} layers in {description['num_blocks']} blocks"
    )
    return "\n".join([title, "", *lines])


def _block_row(part: dict, level: str | None) -> tuple[str, ...]:
    layers = f"{part['layers'][0]}-{part['layers'][-1]}" if "layers" in part else ""
    intervals = [
        "({:.4g}, {:.4g}]".format(*part[key]) if key in part else "" for key in ((level, f"training_{level}") if level else ())
    ]
    return (str(part["block"]), layers, *intervals, f"{part['parameters']:,}", part["file"], f"{part['bytes']:,}")


def _lines(values: dict, indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
