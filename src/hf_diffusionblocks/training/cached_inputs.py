"""Carried context without the earlier blocks: what enters a block, computed once for a data set and kept on disk."""

from __future__ import annotations

import os
import shutil
import uuid
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..saving import shards
from ..extras import from_extra
from ..models.active import without_dropout
from ..models.base import DiffusionBlocksPreTrainedModel

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

FILE = "data.arrow"


def column_of(block_index: int) -> str:
    """Name of the column that holds what enters a block."""
    return f"input_of_block_{block_index}"


def predecessors_column_of(block_index: int) -> str:
    """Name of the column that says which weights made that: a fingerprint, for [`merge_blocks`] to compare."""
    return f"predecessors_of_block_{block_index}"


def cache_block_inputs(
    model: DiffusionBlocksPreTrainedModel,
    dataset: Dataset,
    block_index: int,
    output_dir: str | PathLike,
    batch_size: int = 8,
) -> Dataset:
    """Compute the hidden states that enter a block, for every row of a data set, and keep them on disk.

    A job that trains the block on the result needs no earlier block. The earlier blocks have to be at the end of their
    training; where they were not, [`merge_blocks`] refuses the job's block.

    Args:
        model: whose blocks pass on what they make of x (recommended, of next tokens or classes), and the earlier blocks loaded: all of them, or, if `dataset` is itself such a
            result for an earlier block, that one and those after it.
        dataset: rows of one shape: `input_ids` of one length (with `attention_mask`, `position_ids`), or
            `pixel_values`, and `labels`. What is random about them (augmentation) would be frozen.
        block_index: from 1.
        output_dir: folder for the Arrow file. The size it will have is logged before.
        batch_size: rows that run at a time.

    Returns:
        The data set with the columns `input_of_block_<block_index>` (`[S, D]` float32 a row) and
        `predecessors_of_block_<block_index>` (a fingerprint of the earlier blocks) in place of an earlier block's,
        memory-mapped. Read it again by `Dataset.from_file(output_dir / "data.arrow")`.

    Raises:
        ValueError: blocks pass nothing on, the block has no predecessor, one that is needed is not loaded, rows
            differ in shape, or the folder holds such a file.
        OSError: the disk has too little room.
        ImportError: `datasets` is not installed.
    """
    with from_extra("datasets", "cache_block_inputs"):
        from datasets import Array2D, Dataset, Features, Value

    start = _start(model, dataset, block_index)
    folder = Path(output_dir)
    if (folder / FILE).exists():
        raise ValueError(f"output_dir={folder} holds {FILE} already")
    rows = dataset.with_format("torch")
    with without_dropout(model):
        predecessors = _predecessors(model, block_index, start, dataset)
        shape = tuple(_inputs_of(rows[:1], model, block_index, start, predecessors)[column_of(block_index)].shape[1:])
        _check_room(folder, block_index, len(dataset) * shape[0] * shape[1] * 4)
        made = {column_of(block_index): Array2D(shape, "float32"), predecessors_column_of(block_index): Value("string")}
        replaced = [column_of(start), predecessors_column_of(start)] if start else []
        features = Features({name: of for name, of in dataset.features.items() if name not in replaced} | made)
        rows.map(
            _inputs_of,
            fn_kwargs={"model": model, "block_index": block_index, "start": start, "predecessors": predecessors},
            batched=True, batch_size=batch_size, remove_columns=replaced, features=features,
            cache_file_name=str(folder / f".{FILE}"), load_from_cache_file=False, new_fingerprint=uuid.uuid4().hex,
            desc=f"input of block {block_index}",
        )  # fmt: skip
    os.replace(folder / f".{FILE}", folder / FILE)
    return Dataset.from_file(str(folder / FILE))


def _predecessors(model: DiffusionBlocksPreTrainedModel, block_index: int, start: int, dataset: Dataset) -> str:
    """The fingerprint of what is shared and of all earlier blocks, in order; begun by an earlier block's."""
    # Names as in the files of a saved model, which has tied weights once.
    weights = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    of_part: dict[int | None, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        of_part.setdefault(model.block_of_parameter(name), {})[name] = tensor
    found = dataset[0][predecessors_column_of(start)] if start else shards.digest(of_part.get(None, {}))
    for block in range(start, block_index):
        found = shards.digest(of_part[block], found)
    return found


def _inputs_of(
    rows: dict, model: DiffusionBlocksPreTrainedModel, block_index: int, start: int, predecessors: str
) -> dict:
    batch = {}
    for name in (*model.clean_columns, column_of(start)):
        if name in rows:
            if not isinstance(rows[name], torch.Tensor):
                raise ValueError(f"column {name!r}: rows must have one shape, to be packed or cut before")
            batch[name] = rows[name].to(model.device)
    hidden = model.passed_on(model.blocks[block_index], model.clean_input(batch), batch.get(column_of(start)), start)
    return {
        column_of(block_index): hidden.float().cpu().numpy(),
        predecessors_column_of(block_index): [predecessors] * len(hidden),
    }


def _check_room(folder: Path, block_index: int, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.warning(f"what enters block {block_index} takes {size / 2**20:,.1f} MiB in {folder}")
    if size > free:
        raise OSError(f"output_dir={folder} has {free / 2**20:,.1f} MiB free, and needs {size / 2**20:,.1f}")


def _start(model: DiffusionBlocksPreTrainedModel, dataset: Dataset, block_index: int) -> int:
    """The block whose input the data set holds already; 0 where it is to be embedded."""
    if not model.formulation.passes_on:
        raise ValueError(f"a model with preset={model.config.preset!r} for {model.task} has nothing to cache: its blocks pass nothing on")
    if not 1 <= block_index < model.num_blocks:
        raise ValueError(f"block_index={block_index} must lie in 1..{model.num_blocks - 1}")
    held = [k for k in range(1, block_index) if column_of(k) in dataset.column_names]
    start = max(held, default=0)
    absent = sorted(set(range(start, block_index)) - set(model.resident_blocks))
    if absent:
        raise ValueError(f"block_index={block_index} needs the blocks {absent}: resident_blocks={model.resident_blocks}")
    return start
