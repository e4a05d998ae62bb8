"""The files of a saved model: a safetensors file of the shared parameters, one for each block, and their index.

`model-00001-of-0000N.safetensors` holds what is shared and the next files a block each. The index is Hugging Face's
(key -> file), so plain `from_pretrained` works; its metadata also maps blocks to files, so one block can be read alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

#: Arguments of `save_pretrained` that are for the Hub.
HUB_KWARGS = ("repo_id", "commit_message", "private", "token", "create_pr", "revision", "commit_description", "tags")

# A save is written to STAGED and, once whole, renamed to COMPLETE, from where its files replace the old ones. A save
# killed in STAGED never happened; one killed in COMPLETE is finished by whoever reads or writes the folder next, by
# several at a time if they come together. (There is one writer at a time.)
STAGED, COMPLETE = ".saving", ".saved"


#: Weights that a save has written, in one file or in numbered shards: any other file of the folder is somebody's own.
OF_A_SAVE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Provenance:
    """Who trained what, as it lies beside the weights.

    Args:
        updates: of each block, in the run that saved them.
    """

    updates: Sequence[int]

    @property
    def trained(self) -> list[int]:
        """The blocks that moved."""
        return [block for block, count in enumerate(self.updates) if count]

    @staticmethod
    def of_all(jobs: Sequence[Provenance | None]) -> Provenance | None:
        """Of jobs together; None if one of them does not tell."""
        if None in jobs:
            return None
        return Provenance([sum(counts) for counts in zip(*(job.updates for job in jobs))])


@dataclass(frozen=True)
class Index:
    """What an index file says.

    Args:
        weight_map: key -> file.
        files: "shared" and the numbers of the blocks -> file; None where the checkpoint is not split by block.
        provenance: None where it does not tell.
    """

    weight_map: Mapping[str, str]
    files: Mapping[str, str] | None = None
    provenance: Provenance | None = None


@contextmanager
def atomic_save(folder: Path) -> Iterator[Path]:
    """Give a folder to write to; its files reach `folder` only if all of them were written."""
    folder.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(folder)
    staging = folder / STAGED
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        os.rename(staging, folder / COMPLETE)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    finish_interrupted_save(folder)


def finish_interrupted_save(folder: Path) -> bool:
    """Move the files of a complete save into place; True if there was one.

    Other processes may do the same at the same time: each finds any step taken already. Once one of them is through,
    nothing is left to do, and COMPLETE is gone.
    """
    complete = folder / COMPLETE
    if not complete.is_dir():
        return False
    parts = [(Path(part), names) for part, _, names in os.walk(complete)]  # (passes over what vanishes meanwhile)
    for path in sorted(part / name for part, names in parts for name in names):
        target = folder / path.relative_to(complete)
        target.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process has moved it
            os.replace(path, target)
    _remove_stale_weights(folder)
    for part, _ in reversed(parts):
        with suppress(OSError):  # gone already; or not empty, and so the writer's next save, which it finishes itself
            part.rmdir()
    return True


def _remove_stale_weights(folder: Path) -> None:
    """Remove weights of an older save with other file names: a stale model.safetensors would beat the index."""
    # Listed before the index is read: what the writer moves here meanwhile, as its next save, is not looked at. Of a
    # save that was listed in part, the index is still to come.
    found = [path for path in folder.glob("model*.safetensors") if OF_A_SAVE.fullmatch(path.name)]
    if (folder / COMPLETE / SAFE_WEIGHTS_INDEX_NAME).exists() or not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return
    current = set(read_index(folder / SAFE_WEIGHTS_INDEX_NAME).weight_map.values())
    for path in found:
        if path.name not in current:
            path.unlink(missing_ok=True)


def check_overwrite(folder: Path, blocks: Sequence[int]) -> None:
    """Check that a save of some of the blocks deletes no weights that it does not replace.

    Raises:
        ValueError: `folder` holds other blocks, or a model that is not split by block; names the files.
    """
    finish_interrupted_save(folder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = (read_index(index).files if index.is_file() else None) or {}
    replaced = {file for part, file in files.items() if part in ("shared", *map(str, blocks))}
    found = (path.name for path in folder.glob("model*.safetensors"))
    lost = sorted(name for name in found if OF_A_SAVE.fullmatch(name) and name not in replaced)
    if lost:
        raise ValueError(
            f"save_directory={folder} holds {', '.join(lost)}, which a model with resident_blocks={list(blocks)} alone "
            "would delete: save it to another folder. merge_blocks joins the two"
        )


def split_by_block(
    folder: Path, block_of_parameter: Callable[[str], int | None], num_blocks: int, provenance: Provenance | None = None
) -> None:
    """Replace the one weights file that HF wrote to `folder` by a file for what is shared and one for each block in it."""
    whole = folder / SAFE_WEIGHTS_NAME
    written = {}
    with safe_open(whole, framework="pt") as weights:
        for number, block in enumerate([None, *range(num_blocks)], start=1):
            file = f"model-{number:05}-of-{num_blocks + 1:05}.safetensors"
            tensors = {key: weights.get_tensor(key) for key in weights.keys() if block_of_parameter(key) == block}
            if tensors:  # not of a block that is not loaded
                save_file(tensors, folder / file, metadata={"format": "pt"})
                written["shared" if block is None else str(block)] = file
    write_index(folder, written, provenance)
    whole.unlink()


def write_index(folder: Path, files: dict[str, str], provenance: Provenance | None = None) -> None:
    """Index the files in `folder` of "shared" and of the blocks, by their headers."""
    weight_map, total_size = {}, 0
    for file in files.values():
        tensors = parse_local_safetensors_file_metadata(folder / file).tensors
        weight_map |= dict.fromkeys(tensors, file)
        total_size += max(tensor.data_offsets[1] for tensor in tensors.values())
    metadata = {"total_size": total_size, "blocks": files}
    if provenance is not None:
        metadata["provenance"] = asdict(provenance)
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def read_index(path: Path) -> Index:
    """Read an index file.

    Raises:
        OSError: the file is missing or damaged; names it.
    """
    try:
        index = json.loads(path.read_text())
        weight_map, metadata = index["weight_map"], index["metadata"]
        files, told = metadata.get("blocks", {}), metadata.get("provenance")
        provenance = None if told is None else Provenance(**told)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OSError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not all(isinstance(part, dict) for part in (weight_map, metadata, files)):
        raise OSError(f"{path} is damaged: weight_map, metadata and metadata['blocks'] must be dictionaries")
    return Index(weight_map, metadata.get("blocks"), provenance)


def check_shards(folder: Path) -> None:
    """Check that every file the index names is there, whole, and holds what the index says.

    Raises:
        OSError: names the file (or the index) that is missing, truncated or damaged, or the weight that is not there.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return
    weight_map = read_index(index).weight_map
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not path.is_file():
            raise OSError(f"{path} is missing: {SAFE_WEIGHTS_INDEX_NAME} names it")
        size, expected = path.stat().st_size, _promised_size(path)
        if size != expected:
            raise OSError(f"{path} is truncated: it has {size} bytes, its header promises {expected}")
        with safe_open(path, framework="pt") as weights:
            check_names(path, weights.keys(), weight_map)


def check_names(path: str | os.PathLike, names: Iterable[str], weight_map: Mapping[str, str]) -> None:
    """Raise OSError if a file, which holds these weights, lacks one that the index says it holds; names both."""
    held, named = set(names), {name for name, file in weight_map.items() if file == Path(path).name}
    if named - held:
        raise OSError(
            f"{path} lacks {min(named - held)}, which {SAFE_WEIGHTS_INDEX_NAME} says it holds"
            + (f"; it holds {min(held - named)}: the file of another block?" if held - named else "")
        )


def _promised_size(path: Path) -> int:
    """Size of a safetensors file by its header: 8 bytes of header length, the header, the tensors back to back."""
    with path.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        if header_length > path.stat().st_size:
            raise OSError(f"{path} is truncated: its header is cut off")
        try:
            header = json.loads(stream.read(header_length))
        except ValueError:
            raise OSError(f"{path} is truncated or damaged: its header is not JSON") from None
    offsets = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return 8 + header_length + max(offsets, default=0)


def align(model: torch.nn.Module) -> None:
    """Copy CPU weights that are not aligned in memory, as slices of a mapped file are not.

    Matrix products round differently for them: without this a reloaded model differs from the saved one in the
    last bits.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def load_block_state_dict(
    pretrained_model_name_or_path: str | os.PathLike, block_index: int | None, **hub_kwargs
) -> dict[str, torch.Tensor]:
    """The weights of one block alone, of a folder or hub id; no other block's file is read or downloaded.

    Args:
        block_index: which block; None for the shared parameters (nothing, where every block has its own).
        hub_kwargs: `revision`, `token`, `cache_dir`, ... as in `from_pretrained`.

    Returns:
        State dict on the CPU, for `model.load_state_dict(..., strict=False)`.

    Raises:
        OSError: the file is missing, lacks a weight, or the index is damaged; names it.
        ValueError: there is no such block, or the checkpoint is not split by block.
    """
    index = saved_index(pretrained_model_name_or_path, **hub_kwargs)
    files = index.files
    if files is None:
        cached_file(pretrained_model_name_or_path, CONFIG_NAME, **hub_kwargs)  # says if there is nothing, or nobody answers
        raise ValueError(f"{pretrained_model_name_or_path} is not a DiffusionBlocks checkpoint: its index names no blocks")
    key = "shared" if block_index is None else str(block_index)
    if block_index is None and key not in files:  # each block has all that it needs
        return {}
    if key not in files:
        raise ValueError(f"block_index={block_index} must be one of {', '.join(sorted(files))} (None for shared)")
    path = cached_file(pretrained_model_name_or_path, files[key], **hub_kwargs)
    weights = load_file(path)
    check_names(path, weights, index.weight_map)
    return weights


def saved_index(pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs) -> Index:
    """The index of a folder, whose interrupted save it finishes, or of a hub id; empty where there is none."""
    finish_interrupted_save(Path(pretrained_model_name_or_path, hub_kwargs.get("subfolder") or ""))
    index = cached_file(
        pretrained_model_name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    return Index({}) if index is None else read_index(Path(index))
