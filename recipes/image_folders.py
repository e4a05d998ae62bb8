"""A saved pipeline of diffusers: its parts, and whether its transformer can be tuned."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import transformers
from torch import nn


def pipeline_folder(model: str) -> str:
    """Where a pipeline is: a folder, or a hub id that is fetched.

    Raises:
        ValueError, OSError: it is neither.
    """
    if Path(model).exists():
        return model
    try:
        return diffusers.DiffusionPipeline.download(model, use_safetensors=True)
    except (ValueError, OSError) as error:
        raise OSError(f"model={model!r} must be a folder or hub id of a pipeline of diffusers: {error}") from error


def read_index(folder: str) -> dict[str, Any]:
    """Class names of a saved pipeline's parts.

    Raises:
        ValueError: it has none of which the transformer could be tuned.
    """
    path = Path(folder, "model_index.json")
    if not path.is_file():
        raise ValueError(f"model={folder!r} must be a pipeline of diffusers: it has no model_index.json")
    index = json.loads(path.read_text())
    name = index.get("_class_name")
    parts = {name for name, part in index.items() if isinstance(part, list) and part[0]}
    if "unet" in parts:
        raise ValueError(f"model={folder!r} is a {name}, whose denoiser is a U-Net: it must be a transformer")
    for part in ("transformer", "vae", "scheduler"):
        if part not in parts:
            raise ValueError(f"model={folder!r} is a {name} without a {part}: it must have one")
    if several := sorted(part for part in parts if part.startswith("transformer_")):
        raise ValueError(f"model={folder!r} is a {name} with {several[0]}, too: it must have one transformer")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"model={folder!r} must be a pipeline of diffusers itself, not {name!r}: code of others is not run")
    return index


def pipeline_class(index: dict[str, Any]) -> type[diffusers.DiffusionPipeline]:
    return getattr(diffusers, index["_class_name"])


def taken(index: dict[str, Any]) -> str:
    """What a pipeline is told to draw: "prompt" or "class_labels". Raises ValueError if it is neither."""
    arguments = inspect.signature(pipeline_class(index).__call__).parameters
    for name in ("prompt", "class_labels"):
        if name in arguments:
            return name
    raise ValueError(f"{index['_class_name']} must take a prompt or class_labels, to be tuned")


def encoder_names(folder: str) -> list[str]:
    """Of the models of a pipeline that are neither its transformer nor its VAE."""
    others = {name: part for name, part in read_index(folder).items() if isinstance(part, list) and part[0] == "transformers"}
    kinds = {name: getattr(transformers, part[1], None) for name, part in others.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]


def transformer_class(index: dict[str, Any]) -> type[nn.Module]:
    """Of a pipeline's transformer. Raises ValueError if it is not one of diffusers."""
    library, name = index["transformer"]
    if library != "diffusers" or not hasattr(diffusers, name):
        raise ValueError(f"{index['_class_name']}: its transformer {library}.{name} must be one of diffusers")
    return getattr(diffusers, name)
