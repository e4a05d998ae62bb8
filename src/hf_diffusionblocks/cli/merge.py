"""`diffusionblocks merge`: the saved models of jobs that trained different blocks become one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..configuration import option
from ..saving.merging import merge_blocks
from .inspect import block_table, describe
from .arguments import parse_verb


@dataclass
class MergeArguments:
    overwrite: bool = option(False, "Replace the model that OUT_DIR holds.")


def run(args: list[str]) -> None:
    options, out_dir, jobs = parse_verb(
        "merge",
        [MergeArguments],
        {"OUT_DIR": "folder for the whole model", "JOB...": "folders of the jobs' saved models"},
        args,
        description="Check that jobs fit (same config and shared parameters, every block once), join them, and print "
        "the blocks.",
    )
    if (Path(out_dir) / CONFIG_NAME).exists() and not options.overwrite:
        raise ValueError(f"OUT_DIR={out_dir} holds a model already: --overwrite replaces it")
    merge_blocks(jobs, out_dir)
    print(block_table(describe(out_dir)))
