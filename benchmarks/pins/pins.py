"""Writes down what the package computes, bit for bit, and compares two such records.

    python benchmarks/pins/pins.py record OUT.json
    python benchmarks/pins/pins.py compare A.json B.json

`record` runs whatever `hf_diffusionblocks` can be imported (PYTHONPATH chooses) through its public face alone, on tiny
models on one thread. `compare` lists every difference and fails if there is one. Two records are of one machine: others
round differently.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
from digests import Pins, differences
from transformers.utils import logging

import hf_diffusionblocks as db


def record(output: Path) -> None:
    """Everything, into one JSON file of name -> digest."""
    from of_files import pin_files
    from of_models import pin_models
    from of_training import pin_training

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"hf_diffusionblocks of {Path(db.__file__).parent}", flush=True)
    pins = Pins()
    with tempfile.TemporaryDirectory() as folder:
        for what, pin in (
            ("models", lambda: pin_models(pins)),
            ("files", lambda: pin_files(pins, Path(folder))),
            ("training", lambda: pin_training(pins, Path(folder))),
        ):
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
            start, before = time.perf_counter(), len(pins)
            pin()
            print(f"{what}: {len(pins) - before} pins in {time.perf_counter() - start:.0f} s", flush=True)
    output.write_text(json.dumps(pins, indent=1, sort_keys=True) + "\n")
    print(f"{len(pins)} pins in {output}")


def compare(one: Path, other: Path) -> int:
    """Print every difference; how many there are."""
    number = 0
    for line in differences(json.loads(one.read_text()), json.loads(other.read_text())):
        print(line)
        number += 1
    print(f"{number} differences" if number else "no difference")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("record").add_argument("output", type=Path)
    for_comparison = commands.add_parser("compare")
    for_comparison.add_argument("one", type=Path)
    for_comparison.add_argument("other", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.output)
    else:
        sys.exit(1 if compare(args.one, args.other) else 0)


if __name__ == "__main__":
    main()
