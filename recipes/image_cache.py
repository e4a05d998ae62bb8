"""Latents and conditions of images on disk, computed once; and their rows in the order in which they train."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

from hf_diffusionblocks.recipes.files import opened
from hf_diffusionblocks.recipes.image_latents import PROBES
from hf_diffusionblocks.recipes.image_pipelines import Habits, WatchedPipeline, join_rows, split_rows

INDEX = "cache.json"
FORMAT = 1
MOST_LENGTHENED = 2.0  #: the longer side of a bucket, beside the shorter


@dataclass(frozen=True)
class Row:
    """An image of the data.

    Args:
        number: its row.
        drawn: its prompt, or class.
        size: height and width it is given.
        name: of its file in the cache: a function of image, prompt and size.
    """

    number: int
    drawn: str | int
    size: tuple[int, int]
    name: str


# ---- sizes


def bucket_sizes(resolution: int, step: int, buckets: bool) -> list[tuple[int, int]]:
    """Heights and widths of about `resolution` squared pixels, in multiples of `step`; the square alone without `buckets`."""
    square = resolution // step * step
    sizes = {(square, square)}
    for short in range(step, square, step) if buckets else ():
        long = int(resolution**2 / short) // step * step
        if long <= MOST_LENGTHENED * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def size_of(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is nearest to an image's."""
    shape = math.log(image.height / image.width)
    if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # stored on its side
        shape = -shape
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))


def content_of(value: dict[str, Any]) -> bytes:
    """Of a column of images that is not decoded."""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def pixels(content: bytes, size: tuple[int, int]) -> torch.Tensor:
    """An image, upright, resized, cropped around the middle, `[3, H, W]` in [-1, 1]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def plan_rows(data: Dataset, image_column: str, column: str, sizes: Sequence[tuple[int, int]]) -> list[Row]:
    """A row for each image. Raises ValueError if one cannot be read."""
    rows = []
    for number, (value, drawn) in enumerate(zip(data[image_column], data[column])):
        with opened(value, f"image_column={image_column!r} of row {number}") as image:
            size = size_of(image, sizes)
        rows.append(Row(number, drawn, size, _name(content_of(value), drawn, size)))
    return rows


def _name(content: bytes, drawn: str | int, size: tuple[int, int]) -> str:
    return hashlib.sha256(content + json.dumps([drawn, size]).encode()).hexdigest()[:32]


def without_prompt(size: tuple[int, int]) -> Row:
    """The row whose conditions stand in for those of a caption that is dropped."""
    return Row(-1, "", size, f"empty-{size[0]}x{size[1]}")


# ---- files


def write(path: Path, value: Any) -> None:
    """Nested lists, tuples and dicts of tensors and plain values, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_structure(value, tensors))
    aside = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, aside, metadata={"structure": structure})
    os.replace(aside, path)


def read(path: Path) -> Any:
    """What [`write`] wrote."""
    with safe_open(path, framework="pt") as file:
        return _filled(json.loads(file.metadata()["structure"]), file)


def kind_of(path: Path) -> dict[str, Any]:
    """Of a row, the same for all that can be in one batch: tensors of the same shapes, or lists of any, in the same places."""
    with safe_open(path, framework="pt") as file:
        return _alike(json.loads(file.metadata()["structure"]))["dict"]


def _alike(structure: Any, listed: bool = False) -> Any:
    if isinstance(structure, list):
        return [_alike(each, listed) for each in structure]
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return "tensor" if listed else structure
    return {name: _alike(each, listed or name == "list") for name, each in structure.items()}


def _structure(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name, "shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": {key: _structure(each, tensors) for key, each in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_structure(each, tensors) for each in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a condition of type {type(value).__name__} is not supported")


def _filled(structure: Any, file: safe_open) -> Any:
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return file.get_tensor(structure["tensor"])
    ((kind, inside),) = structure.items()
    if kind == "dict":
        return {key: _filled(each, file) for key, each in inside.items()}
    return {"list": list, "tuple": tuple}[kind](_filled(each, file) for each in inside)


def fingerprint(folder: str) -> str:
    """Of all that makes latents and conditions: files of a pipeline but for its transformer's weights."""
    found, ends = hashlib.sha256(), 1 << 16
    root = Path(folder)
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        name = path.relative_to(root)
        if name.parts[0] == "transformer" and path.name != "config.json":
            continue
        if len(name.parts) > 1 or path.name == "model_index.json":
            found.update(f"{name} {path.stat().st_size}".encode())
            with path.open("rb") as file:  # (of weights, both ends)
                found.update(file.read(ends))
                file.seek(max(0, path.stat().st_size - ends))
                found.update(file.read(ends))
    return found.hexdigest()


class Cache:
    """A folder with a file a row.

    Args:
        made_with: what files depend on beside image, prompt and size; by the names of arguments.

    Raises:
        ValueError: it was made with something else.
    """

    def __init__(self, folder: str | Path, made_with: dict[str, Any]):
        self.folder = Path(folder)
        self._made_with = json.loads(json.dumps(made_with | {"format": FORMAT}))
        self.habits: Habits | None = None
        index = self.folder / INDEX
        if index.is_file():
            found = json.loads(index.read_text())
            for name, value in self._made_with.items():
                if (had := found["made_with"].get(name)) != value:
                    which = "another model" if name == "fingerprint" else f"{name}={had!r}, not {value!r}"
                    raise ValueError(f"cache_dir={str(folder)!r} was made with {which}: name another folder, or remove it")
            self.habits = Habits(**{k: tuple(v) if isinstance(v, list) else v for k, v in found["habits"].items()})

    def path(self, row: Row) -> Path:
        return self.folder / f"{row.name}.safetensors"

    def file_of(self, kind: str, given: dict[str, Any]) -> Path:
        """Of something else, which depends on what is given."""
        key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / f"{kind}-{key}.safetensors"

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those that are still to be computed, each once."""
        return list({row.name: row for row in rows if not self.path(row).is_file()}.values())

    def fill(
        self, rows: Sequence[Row], data: Dataset, image_column: str, pipeline: WatchedPipeline, options: dict[str, Any],
        batch_size: int,
    ) -> None:  # fmt: skip
        """Compute what is missing.

        Args:
            options: of [`WatchedPipeline.options`], but for the size.
            batch_size: rows whose prompts are encoded together.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        by_size = defaultdict(list)
        for row in self.missing(rows):
            by_size[row.size].append(row)
        # Every call has the longest prompt and none in it: so embeddings that are padded to the longest are all as long.
        shortest_and_longest = ["" if pipeline.takes == "prompt" else 0, max((row.drawn for row in rows), key=pipeline.length)]
        drawn = [shortest_and_longest[0]] * (PROBES - 2) + shortest_and_longest
        for size, some in by_size.items():
            if self.habits is None:
                self._begin(pipeline.habits(drawn, pipeline.options(size, **options)))
            given = pipeline.options(size, **options)
            latent_map = pipeline.latent_map(pipeline.watch(drawn, given))
            for start in range(0, len(some), batch_size):
                chunk = some[start : start + batch_size]
                call = pipeline.watch([*(row.drawn for row in chunk), *shortest_and_longest], given)
                for row, conditions in zip(chunk, split_rows(call.passed.conditions, self.habits.per_row, len(chunk) + 2)):
                    latents = None
                    if row.number >= 0:
                        content = content_of(data[row.number][image_column])
                        latents = pipeline.encode(pixels(content, size)[None], latent_map)
                    write(self.path(row), {"latents": latents, "conditions": conditions})

    def _begin(self, habits: Habits) -> None:
        self.habits = habits
        aside = self.folder / f"{INDEX}.{os.getpid()}"
        aside.write_text(json.dumps({"made_with": self._made_with, "habits": asdict(habits)}, indent=1))
        os.replace(aside, self.folder / INDEX)


# ---- rows in training


class CachedImages(torch.utils.data.Dataset):
    """Rows of a cache. The number of a row gives its latents and conditions, -1 minus it the same without its caption."""

    def __init__(self, cache: Cache, rows: Sequence[Row]):
        self.cache, self.rows, self.epoch = cache, list(rows), 0

    def set_epoch(self, epoch: int) -> None:
        """As Accelerate tells the epoch, where it does not reach the sampler: one of several processes that resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number if number >= 0 else -1 - number]
        found = read(self.cache.path(row))
        if number < 0:
            found["conditions"] = read(self.cache.path(without_prompt(row.size)))["conditions"]
        return found

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows that are alike -> latents `[N, ...]` and conditions of N rows."""
        latents = torch.cat([row["latents"] for row in rows])
        return {"latents": latents, "conditions": join_rows([row["conditions"] for row in rows], self.cache.habits.per_row)}


class BucketSampler(torch.utils.data.Sampler):
    """Numbers of rows, shuffled, so that each `batch_size` of them are alike: of one size, and with conditions of the same
    shapes. A bucket's last batch is filled up with rows of the same bucket.

    Args:
        caption_dropout: share of the rows that are given without their caption (-1 minus the number).
        seed: with the epoch, says the order.
    """

    def __init__(self, images: CachedImages, batch_size: int, caption_dropout: float, seed: int):
        self._batch_size, self._dropout, self._seed, self._images = batch_size, caption_dropout, seed, images
        cache, rows = images.cache, images.rows
        kinds = [kind_of(cache.path(row)) for row in rows]
        self._kinds = [(json.dumps(kind), row.size) for kind, row in zip(kinds, rows)]
        self._stays_alike = [True] * len(rows)
        if caption_dropout:
            empty = {row.size: kind_of(cache.path(without_prompt(row.size)))["conditions"] for row in rows}
            self._stays_alike = [kind["conditions"] == empty[row.size] for kind, row in zip(kinds, rows)]
        self._length = len(self._order())  # (of any epoch)

    def set_epoch(self, epoch: int) -> None:
        self._images.set_epoch(epoch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self._order())

    def _order(self) -> list[int]:
        drawn = np.random.default_rng([self._seed, self._images.epoch])
        dropped = drawn.random(len(self._kinds)) < self._dropout
        buckets = defaultdict(list)
        for number in drawn.permutation(len(self._kinds)).tolist():
            buckets[self._kinds[number]].append(number)
        batches = []
        for rows in buckets.values():
            rows += [rows[i % len(rows)] for i in range(-len(rows) % self._batch_size)]
            batches += [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        order = []
        for index in drawn.permutation(len(batches)):
            for number in batches[index]:  # (where rows with and without caption are not alike, a batch has one kind)
                decides = number if self._stays_alike[number] else batches[index][0]
                order.append(-1 - number if dropped[decides] else number)
        return order
