"""Files of rows, and images in them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image


def read_files(args, reader_of: Callable[[str], tuple[str, dict[str, Any]]]) -> DatasetDict:
    """The data sets of `train_file` and `validation_file`, those that are named.

    Args:
        reader_of: of a file: what `load_dataset` reads it with, and options.
    """
    data = DatasetDict()
    for split in ("train", "validation"):
        if file := getattr(args, name := f"{split}_file"):
            data[split] = read_file(name, file, *reader_of(file))
    return data


def read_file(name: str, file: str, reader: str, options: dict[str, Any]) -> Dataset:
    """All rows and columns of a file, or of those that a pattern stands for.

    Raises:
        ValueError: it cannot be read, or has no rows; names the argument that names it.
    """
    try:
        rows = load_dataset(reader, data_files=file, split="train", **options)
    except Exception as error:  # Arrow, Python and datasets each raise their own: of an empty file, StopIteration
        is_empty = Path(file).is_file() and not Path(file).stat().st_size
        raise ValueError(f"{name}={file!r} cannot be read: {'it is empty' if is_empty else error.__cause__ or error}") from None
    if not len(rows):
        raise ValueError(f"{name}={file!r} has no rows")
    return rows


def opened(value: dict[str, Any], what: str) -> Image.Image:
    """An image of a column that is not decoded; its header alone is read.

    Args:
        what: it is, as errors name it.

    Raises:
        ValueError: it is missing, is no image, or has numbers that PIL's conversion would cut off at 255.
    """
    try:
        image = Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))
    except (OSError, TypeError) as error:
        raise ValueError(f"{what} is no image: {error}") from None
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{what} has PIL's mode {image.mode!r}, and must have 8 bits a channel: what is above 255 would be white"
        )
    return image
