"""`merge_blocks`: jobs that trained different blocks become one model, file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..configuration import DiffusionBlocksConfig
from ..tasks import TASKS
from . import cards, shards
from .shards import Provenance

#: Fields of a config that may differ between jobs.
OF_THE_JOB = ("training_report", "_name_or_path", "transformers_version")
#: What else a model's folder may hold that belongs to the model: of generation, tokenizers and image processors.
COMPANIONS = (
    "generation_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt",
    "chat_template*",
)  # fmt: skip


@dataclass
class _Job:
    folder: Path
    config: DiffusionBlocksConfig
    files: dict[str, str]  # "shared" and the numbers of its blocks -> file
    provenance: Provenance | None  # None: it does not tell what it trained

    @property
    def blocks(self) -> list[int]:
        return sorted(int(part) for part in self.files if part != "shared")

    @property
    def trained(self) -> list[int]:
        """The blocks that moved, as the Trainer has noted them."""
        return [] if self.provenance is None else self.provenance.trained

    def load(self, part: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / self.files[part])


def merge_blocks(jobs: Sequence[str | PathLike], output_dir: str | PathLike) -> None:
    """Join the saved models of jobs that trained different blocks, and save the whole one.

    A block comes from the job that trained it; one that none trained, from any that holds it. A folder that does not
    tell (trained by hand, or only converted) may have trained whatever it holds: where others hold that too, it must be equal.
    Two files are in memory at a time.

    Args:
        jobs: folders, as the Trainer or `save_pretrained` wrote them.
        output_dir: folder for the model; written whole or not at all.

    Raises:
        OSError: a folder or one of its files is missing or damaged.
        ValueError: the jobs do not fit: configs, tokenizers or shared parameters differ, a block was trained twice or is nowhere,
            or may have been by a folder that does not tell, or one was trained around another version of an earlier
            block. Says which, and where.
    """
    if not jobs or isinstance(jobs, (str, PathLike)):
        raise ValueError(f"jobs={jobs!r} must be a list of at least one folder")
    if Path(output_dir).resolve() in [Path(job).resolve() for job in jobs]:
        raise ValueError(f"output_dir={str(output_dir)!r} must not be one of the jobs")
    opened = [_open(Path(folder)) for folder in jobs]
    _check_configs(opened)
    _check_tokens(opened)
    source_of = _sources(opened)
    _check_shared(opened)
    with torch.device("meta"):
        model = TASKS[opened[0].config.task].model_class(opened[0].config)
    _check_predecessors(opened, source_of, model.blocks)
    _write(opened, source_of, model, Path(output_dir))


def _open(folder: Path) -> _Job:
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    index = shards.saved_index(folder)
    shards.check_shards(folder)
    if index.files is None:
        raise ValueError(f"{folder} is not a DiffusionBlocks checkpoint: its index names no blocks")
    return _Job(folder, DiffusionBlocksConfig.from_pretrained(folder), index.files, index.provenance)


def _check_configs(jobs: list[_Job]) -> None:
    first, *others = jobs
    expected = _compared(first.config)
    for job in others:
        found = _compared(job.config)
        for name in sorted(expected.keys() | found.keys()):
            if name not in OF_THE_JOB and expected.get(name) != found.get(name):
                raise ValueError(
                    f"the jobs' configs differ: {name}={expected.get(name)!r} in {first.folder}, "
                    f"{found.get(name)!r} in {job.folder}"
                )


def _check_tokens(jobs: list[_Job]) -> None:
    """A token has to be the same text to all blocks."""
    files = [file for job in jobs if (file := job.folder / "tokenizer.json").is_file()]
    models = [json.loads(file.read_text())["model"] for file in files]
    for file, model in zip(files[1:], models[1:]):
        if model != models[0]:
            raise ValueError(f"the jobs' tokenizers differ: {files[0]} and {file} have other tokens")


def _compared(config: DiffusionBlocksConfig) -> dict:
    """Its fields, and the plain model's; but for `use_cache`, which the Trainer sets of the models that it has, and the plain
    one's `dtype`, which loading does."""
    fields = config.to_dict()
    plain = fields.pop("source_config").items()
    return fields | {f"source_config.{name}": value for name, value in plain if name not in ("use_cache", "dtype")}


def _sources(jobs: list[_Job]) -> dict[int, _Job]:
    """Of each block, the job that it is taken from."""
    sources = {}
    for block in range(jobs[0].config.num_blocks):
        holders = [job for job in jobs if block in job.blocks]
        trainers = [job for job in holders if block in job.trained]
        if not holders:
            raise ValueError(f"block {block} is in none of {', '.join(str(job.folder) for job in jobs)}")
        if len(trainers) > 1:
            raise ValueError(f"block {block} was trained by both {trainers[0].folder} and {trainers[1].folder}")
        sources[block] = source = (trainers or holders)[0]
        for other in (job for job in holders if job is not source):
            silent = next((job for job in (source, other) if job.provenance is None), None)
            if silent:
                what = f"{silent.folder} does not tell what it trained (its index has no provenance): block {block}"
                _check_equal(source, other, str(block), what)
            elif not trainers:
                _check_equal(source, other, str(block), f"block {block}, which neither trained,")
    return sources


def _check_shared(jobs: list[_Job]) -> None:
    for job in jobs[1:]:
        if ("shared" in job.files) != ("shared" in jobs[0].files):
            raise ValueError(f"one of {jobs[0].folder} and {job.folder} lacks the shared parameters")
        if "shared" in job.files:
            _check_equal(jobs[0], job, "shared", "what all blocks share (parameters, target embeddings)")


def _check_predecessors(jobs: list[_Job], source_of: dict[int, _Job], blocks: Sequence) -> None:
    """A block that builds on earlier ones was trained on what they made of the input, so on these very blocks."""
    for job in jobs:
        last = max(job.trained, default=0)
        for block in sorted(set(blocks[last].predecessors).intersection(job.blocks)):
            if job.trained and source_of[block] is not job:
                what = f"block {block}, around which {job.folder} trained block {max(job.trained)},"
                _check_equal(source_of[block], job, str(block), what)


def _check_equal(one: _Job, other: _Job, part: str, what: str) -> None:
    first, second = one.load(part), other.load(part)
    differing = sorted(first.keys() ^ second.keys())
    differing += [name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])]
    if differing:
        raise ValueError(f"{what} differs between {one.folder} and {other.folder}: {min(differing)}")


def _write(jobs: list[_Job], source_of: dict[int, _Job], model: PreTrainedModel, output_dir: Path) -> None:
    model.config.training_report = _merged_report(jobs)
    with shards.atomic_save(output_dir) as staging:
        parts = {"shared": jobs[0]} if "shared" in jobs[0].files else {}
        parts |= {str(block): job for block, job in source_of.items()}
        for part, job in parts.items():
            shutil.copyfile(job.folder / job.files[part], staging / job.files[part])
        files = {part: job.files[part] for part, job in parts.items()}
        shards.write_index(staging, files, Provenance.of_all([job.provenance for job in jobs]))
        for pattern in COMPANIONS:
            for path in jobs[0].folder.glob(pattern):
                shutil.copyfile(path, staging / path.name)
        model.config.save_pretrained(staging)
        cards.write(model, staging, keep_from=output_dir)


def _merged_report(jobs: list[_Job]) -> dict | None:
    """What holds of all jobs together; results of single blocks say nothing of the model."""
    reports = [job.config.training_report for job in jobs if job.config.training_report]
    if not reports:
        return None
    updates = [sum(counts) for counts in zip(*(report["updates_per_block"] for report in reports))]
    merged = {key: value for key, value in reports[0].items() if all(r.get(key) == value for r in reports)}
    steps = sum(report["steps"] for report in reports)
    return merged | {"updates_per_block": updates, "steps": steps, "results": {}, "memory": {}}
