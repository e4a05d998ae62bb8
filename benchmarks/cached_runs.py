"""Runs of a benchmark's rows, each in a process of its own, kept in a folder: one that is there is not made again."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def parser_of(
    description: str, rows: Iterable[str], data: str, kept: str = "the cached runs and the table"
) -> argparse.ArgumentParser:
    """What these benchmarks are told: where `data` is, the folder of what is kept, and which runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {data}")
    parser.add_argument("--output", type=Path, required=True, help=f"folder of {kept}")
    add_run_options(parser, rows)
    return parser


def add_run_options(parser: argparse.ArgumentParser, rows: Iterable[str]) -> None:
    """Which runs, and how many at a time."""
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--rows", nargs="*", default=list(rows), choices=list(rows), metavar="ROW")


def file_of(folder: Path, rows: Iterable[str], row: str, updates: int, seed: int = 0) -> Path:
    """Where a run's results are kept; without the suffix, the folder of its model."""
    return folder / f"row{list(rows).index(row):02}-seed{seed}-updates{updates}.json"


def results_of(
    run: Callable[[tuple], None], rows: Iterable[str], chosen: Sequence[str], seeds: Sequence[int], settings: dict,
    folder: Path, processes: int,
) -> list[dict]:  # fmt: skip
    """Make the chosen runs that are missing, whole tables first, and give all results that the folder has.

    Args:
        run: of (row, seed, settings, file); writes the file.
        rows: all rows of the benchmark, in the order of their numbers.
        settings: with "updates"; what else a run needs.
        processes: runs at a time.
    """
    updates = settings["updates"]
    wanted = [(row, seed, settings, file_of(folder, rows, row, updates, seed)) for seed in seeds for row in chosen]
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for _ in pool.imap(run, [job for job in wanted if not job[-1].is_file()]):
            pass
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"row*-updates{updates}.json"))]


def run_and_report(
    run: Callable[[tuple], None], rows: Iterable[str], table: Callable[[list[dict]], str], options: argparse.Namespace,
    settings: dict,
) -> None:  # fmt: skip
    """Make the runs that [`parser_of`]'s options choose; keep and print the table of all that there are."""
    results = results_of(run, rows, options.rows, options.seeds, settings, options.output, options.processes)
    report(results, table(results), settings["updates"], options.output)


def table_of(
    columns: Sequence[str], rows: Iterable[str], results: list[dict], cells: Callable[[str, list[dict]], Sequence[str]]
) -> list[str]:
    """Markdown: a line for each row that has runs, which are one a seed.

    Args:
        cells: from a row's name and its runs.
    """
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if runs := [result for result in results if result["row"] == row]:
            lines.append(f"| {' | '.join(cells(row, runs))} |")
    return lines


def report(results: list[dict], table: str, updates: int, folder: Path) -> None:
    """Keep all results as JSON beside their table, and print it."""
    (folder / "results.json").write_text("[\n " + ",\n ".join(map(json.dumps, results)) + "\n]\n")
    (folder / f"table-{updates}.md").write_text(table + "\n")
    print(table)
