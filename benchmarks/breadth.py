"""Streaming on every architecture: exact gradients, at most two units there, nothing on the host's own weights.

    python benchmarks/breadth.py --output benchmarks/results/breadth.json
    python benchmarks/breadth.py --mapping causal-lm masked-lm --names llama bert

Every architecture of transformers' mappings, and some transformers of diffusers, tiny and random, on the CPU (with real
copies), without dropout; and some with their own.
Prints a line for each as it ends, then a table of counts, and what does not hold, by name. What holds by the output
already is not run again, unless it is named or `--again` is given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from breadth_check import WITH_DROPOUT, Result, check
from tiny_diffusers import NAMES as DIFFUSERS
from tiny_models import names_of
from transformers.utils import logging

#: Architectures that have to be exact, with two units there, nothing on the host and enough moved, in each mapping.
AIMS = {
    "causal-lm": 165, "sequence-classification": 96, "token-classification": 85, "question-answering": 60, "masked-lm": 39,
    "image-classification": 20, "seq2seq": 0, "diffusers": 8, "own-dropout": 0,
}  # fmt: skip
#: How processes begin: apart from this one, whose threads a copy of it would not have.
START_METHOD = "spawn"
COLUMNS = ["names", "built", "exact", "to rounding", "two units", "host unused", "bytes moved", "all", "aim"]


def main() -> int:
    arguments = _arguments()
    wanted = [(mapping, name) for mapping in arguments.mapping for name in _names(mapping) if _asked(name, arguments.names)]
    before = [] if arguments.again else _read(arguments.output)
    known = {(each.mapping, each.name): each for each in before}
    todo = wanted if arguments.names else [each for each in wanted if each not in known or not known[each].holds]
    started = time.monotonic()
    for number, result in enumerate(_run(todo, arguments), 1):
        known[result.mapping, result.name] = result
        print(f"{number}/{len(todo)}", round(time.monotonic() - started), "s:", _line(result), flush=True)
        if arguments.output:
            _write(arguments.output, list(known.values()))
    results = [known[each] for each in wanted if each in known]
    print(table(results), exceptions(results), sep="\n\n")
    return 0 if all(_reached(results, mapping) for mapping in arguments.mapping if not arguments.names) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mapping", nargs="+", choices=[*AIMS], default=[*AIMS])
    parser.add_argument("--names", nargs="+", help="only these architectures")
    parser.add_argument("--output", type=Path, help="a JSON file of what was found")
    parser.add_argument("--again", action="store_true", help="run what the output has, too")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=120, help="the longest that one architecture may take")
    return parser.parse_args()


def _names(mapping: str) -> list[str]:
    others = {"diffusers": DIFFUSERS, "own-dropout": WITH_DROPOUT}
    return list(others[mapping] if mapping in others else names_of(mapping))


def _asked(name: str, names: list[str] | None) -> bool:
    return not names or name in names


# ---- processes, of which none takes the others along


class Worker:
    """A process that checks one architecture after the other. It starts with the first, and anew after one that ended it."""

    def __init__(self, arguments: argparse.Namespace):
        self._seconds = arguments.seconds
        self._process = None
        self.task: tuple[str, str] | None = None

    def give(self, task: tuple[str, str]) -> None:
        if self._process is None:
            context = mp.get_context(START_METHOD)
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self.task = task
        self._pipe.send(task)
        self._until = float("inf")  # until it has begun

    def result(self) -> Result | None:
        """What it has found; None if it is not through. If it has died or is late, says so."""
        error = "takes longer than it may" if time.monotonic() > self._until else ""
        if not error and self._pipe.poll(0.05):
            try:
                found = self._pipe.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                error = f"the process ended with status {self._process.exitcode}"
            else:
                if found is None:  # it begins
                    self._until = time.monotonic() + self._seconds
                    return None
                self.task = None
                return found
        if not error:
            return None
        result, self.task = Result(*self.task, error=error), None
        self.end()
        return result

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None


def _work(pipe) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    while True:
        task = pipe.recv()
        pipe.send(None)
        pipe.send(check(*task))


def _run(todo: list[tuple[str, str]], arguments: argparse.Namespace):
    """The results of all, as they come."""
    waiting = list(reversed(todo))
    workers = [Worker(arguments) for _ in range(min(arguments.jobs, len(todo)))]
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if worker.task is None and waiting:
                    worker.give(waiting.pop())
                if worker.task is not None and (result := worker.result()) is not None:
                    yield result
    finally:
        for worker in workers:
            worker.end()


# ---- what is written


def _read(path: Path | None) -> list[Result]:
    return [Result(**each) for each in json.loads(path.read_text())["models"]] if path and path.exists() else []


def _write(path: Path, results: list[Result]) -> None:
    counts = {mapping: dict(zip(COLUMNS, _counts(results, mapping))) for mapping in AIMS}
    path.parent.mkdir(parents=True, exist_ok=True)
    models = [json.dumps(asdict(each)) for each in sorted(results, key=lambda each: ([*AIMS].index(each.mapping), each.name))]
    lines = ",\n  ".join(models)  # a line each
    path.write_text(f'{{\n "counts": {json.dumps(counts)},\n "models": [\n  {lines}\n ]\n}}\n')


def _line(result: Result) -> str:
    if result.difference is None:
        return f"{result.mapping} {result.name}: {result.error}"
    parts = [f"difference {result.difference:.2g}", f"{result.peak_units} units", f"{result.moved:.0%} moved"]
    parts += [f"{len(result.on_host)} on the host's weights"] * bool(result.on_host)
    parts += ["random by itself"] * (not result.repeats)
    return f"{result.mapping} {result.name}: {'' if result.holds else 'NOT: '}{', '.join(parts)}"


def _counts(results: list[Result], mapping: str) -> list[int]:
    found = [each for each in results if each.mapping == mapping]
    named = Counter()
    for each in found:
        named.update({
            "built": each.built, "exact": each.exact, "to rounding": each.rounded, "two units": each.two_units,
            "host unused": each.host_unused, "bytes moved": each.enough_moved, "all": each.holds,
        })  # fmt: skip
    return [len(found), *(named[column] for column in COLUMNS[1:-1]), AIMS[mapping]]


def _reached(results: list[Result], mapping: str) -> bool:
    return _counts(results, mapping)[-2] >= AIMS[mapping]


def table(results: list[Result]) -> str:
    """Counts by mapping, in Markdown."""
    rows = [["", *COLUMNS]]
    rows += [[mapping, *map(str, _counts(results, mapping))] for mapping in AIMS if any(r.mapping == mapping for r in results)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def exceptions(results: list[Result]) -> str:
    """What does not hold, by name, and why."""
    return "\n".join(f"- {_line(each)}" + _detail(each) for each in results if not each.holds)


def _detail(result: Result) -> str:
    parts = [f"differs at {result.differs}"] * bool(result.differs) + [*result.on_host[:3]]
    parts += [result.error] * bool(result.error and result.difference is not None)
    return f" ({'; '.join(parts)})" if parts else ""


if __name__ == "__main__":
    sys.exit(main())
