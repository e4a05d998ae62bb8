"""One command that says whether the package is right, and how fast it is, on this machine's GPU.

    make check-gpu                                   # python benchmarks/gpu.py --output outputs/check_gpu.json
    python benchmarks/gpu.py --only streamed memory   # the checks with such a word in the name

One GPU, no network, no data but random ones, some minutes. Every check is a row of one table: what was looked at, what was
found, what it may be, and whether it holds; measures are ratios of runs side by side, without a limit unless one is given.
Exits with status 1 where something does not hold, raises, or does not come to its turn in `--minutes`. Without a GPU the same
runs on the CPU, in small: it checks the checks, and what needs a GPU says so and counts neither way.

Float32 is compared with TF32 off; the models whose steps are timed are in bfloat16. "Floor" is what counted multiplications
make of a ratio, as in benchmarks/step_cost_text.py.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

import gpu_common  # noqa: F401  first: it sets what has to be set before CUDA starts
import gpu_checks, gpu_streaming, gpu_training, gpu_memory, gpu_measures  # noqa: E401, F401  each registers its checks
from gpu_common import CHECKS, Check, Machine, Row

MARKS = {True: "yes", False: "NO", None: ""}


def rows_of(check: Check, machine: Machine, deadline: float) -> Iterator[Row]:
    """A check's rows; what it raises is one."""
    if check.needs_gpu and not machine.is_gpu:
        yield Row(check.name, "needs a GPU")
        return
    torch.manual_seed(0)
    try:
        for row in check.run(machine):
            yield row
            if time.monotonic() > deadline:
                yield Row(check.name, "not finished: out of time", holds=False)
                return
    except Exception as error:  # of any kind: the other checks go on
        traceback.print_exc()
        yield Row(check.name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", holds=False)
    finally:
        machine.allocated()  # what it has left is let go


def run(checks: Sequence[Check], machine: Machine, minutes: float) -> list[Row]:
    """All rows; each is printed as it comes."""
    deadline, rows = time.monotonic() + 60 * minutes, []
    for check in checks:
        if time.monotonic() > deadline:
            found = [Row(check.name, "not begun: out of time", holds=False)]
        else:
            found = rows_of(check, machine, deadline)
        for row in found:
            rows.append(row)
            print(f"{row.check}: {row.result}{row.allowed and f' ({row.allowed})'} {MARKS[row.holds]}", flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    cells = [("check", "result", "allowed", "holds")]
    cells += [(row.check, row.result, row.allowed, MARKS[row.holds]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def describe(machine: Machine) -> dict[str, str]:
    device = torch.cuda.get_device_name(machine.device) if machine.is_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the rows, the device's name and versions")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row is begun after these")
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="the checks with such a word in the name")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not machine.is_gpu:
        torch.set_num_threads(1)
    about = describe(machine)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if not machine.is_gpu:
        print("No GPU here: the same checks on the CPU, in small. What they show of a GPU is nothing.")
    start = time.monotonic()
    rows = run([check for check in CHECKS if any(word in check.name for word in options.only)], machine, options.minutes)
    failed, unknown = (sum(row.holds is holds for row in rows) for holds in (False, None))
    print(f"\n{table(rows)}\n")
    print(f"{len(rows)} rows, {failed} do not hold, {unknown} measures or for a GPU alone; {time.monotonic() - start:.0f} s")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        about |= {"seconds": round(time.monotonic() - start), "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(about, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
