"""Breaks the code in ways that are named, one at a time, and says whether today's tests notice.

    python benchmarks/pins/mutants.py [--only NAME ...] [--list]

Each mutant of `mutant_table.py` is applied to a copy of the tree, and the tests that are to kill it are run there. Fails
if one survives, or if its old text is not found.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "src/hf_diffusionblocks"
COPIED = ("src", "tests", "recipes", "model_cards", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
#: In an installed package these are part of it; from the source tree they have to be put there.
INSIDE = ("recipes", "model_cards")

NAMED = {mutant.name: mutant for mutant in MUTANTS}

#: A pytest plugin: an editable install must not answer for the copy.
PLUGIN = """
import importlib, os, pytest
from pathlib import Path

def pytest_sessionstart(session):
    for name in (os.environ["MUTATED_MODULE"], "hf_diffusionblocks.recipes", "hf_diffusionblocks.model_cards"):
        found = Path(importlib.import_module(name).__file__).resolve()
        if not found.is_relative_to(Path(__file__).resolve().parent):
            raise pytest.UsageError(f"{name} is imported from {found}, not from the copy")
"""
KILLED, SURVIVED, NOT_FOUND, BROKEN = "killed", "SURVIVED", "old text not found", "ERROR: the tests did not run"


def copied_tree(target: Path) -> None:
    for name in filter(lambda name: (ROOT / name).exists(), COPIED):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    for name in INSIDE:
        os.symlink(target / name, target / PACKAGE / name)
    (target / "mutant_guard.py").write_text(PLUGIN)


def run(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """The verdict, and the last line that pytest says."""
    path = tree / PACKAGE / mutant.file
    if not path.is_file() or path.read_text().count(mutant.old) != 1:
        return NOT_FOUND, f"it has to be in {mutant.file} once"
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    module = "hf_diffusionblocks." + mutant.file.removesuffix(".py").replace("/", ".")
    environment = {
        **os.environ, "PYTHONPATH": f"{tree / 'src'}:{tree}", "MUTATED_MODULE": module, "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutant_guard", "-p", "no:cacheprovider", "--no-header"]
    try:
        result = subprocess.run(
            [*command, *shlex.split(mutant.tests)], cwd=tree, env=environment, capture_output=True, text=True
        )
    finally:
        path.write_text(original)
    verdict = {0: SURVIVED, 1: KILLED}.get(result.returncode, BROKEN)
    return verdict, said(result.stdout + result.stderr)


def said(output: str) -> str:
    """Which test failed; where none did, the last line."""
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    lines = output.strip().splitlines() or [""]
    return failed[0] if failed else lines[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMED)
    parser.add_argument("--list", action="store_true", help="names alone")
    args = parser.parse_args()
    chosen = [NAMED[name] for name in args.only] if args.only else MUTANTS
    if args.list:
        print("\n".join(mutant.name for mutant in chosen))
        return
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copied_tree(tree)
        for mutant in chosen:
            start = time.perf_counter()
            verdict, detail = run(mutant, tree)
            verdicts.append(verdict)
            print(f"{verdict}: {mutant.name} ({time.perf_counter() - start:.0f} s; {detail})", flush=True)
    print(f"{verdicts.count(KILLED)} of {len(verdicts)} killed")
    sys.exit(0 if set(verdicts) == {KILLED} else 1)


if __name__ == "__main__":
    main()
