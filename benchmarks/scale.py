"""The top of the ladder at the size that fits a time: DiffusionBlocks beside end to end, on text, masked text and images.

    python benchmarks/scale_data.py --text FOLDER --images FOLDER --file scale.pt     # once; where the data is
    python benchmarks/scale.py --minutes 20 --device cuda --data scale.pt --output outputs/scale
    python benchmarks/scale.py --minutes 4 --device cpu --data small.pt --output outputs/scale_cpu

On a GPU a GPT-2 small, and models of its depth, in bfloat16; on a CPU (one thread) tiny ones, which prove no more than
that it works. A few steps of each row are timed first: they decide the number of updates, the same for every parameter of all
rows of a task, so that the table is whole in the minutes given, evaluation included. One table and one JSON file come
out. Plans and runs are cached in the output folder one by one, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from cached_runs import file_of
from scale_data import unpacked
from scale_tasks import TASKS, Row, Task, new_trainer
from trained_ledgers import ledgers_of
from transformers import Trainer, TrainerCallback, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db

REHEARSED, UNTIMED = 8, 3  #: updates of a rehearsal, and how many of these come before the clock runs
EVALUATED = 1 / 8  #: share of the held-out texts or images that a rehearsal is measured on
USED = 0.92  #: of the time that is left; the machine may be slower later
LEAST_UPDATES = 20


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def on_step_end(self, *args, **kwargs):
        self.times.append(now(self.device))


def now(device: str) -> float:
    """Wall-clock seconds, when the device is done with what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def worked(device: str) -> float:
    """Seconds that tables give: of the CPU, other processes have no part in them."""
    return time.process_time() if device == "cpu" else now(device)


def fresh(task: Task, row: Row):
    """A model, when others have gone from the device."""
    gc.collect()
    if task.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    set_seed(0)
    return task.new_model(row).to(task.device)


def trained(trainer: Trainer):
    """The model of a Trainer, ready to be measured: in float32, in which Accelerate leaves it only if asked."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()


# ---- how many updates


def rehearsed(task: Task, row: Row, output: str) -> dict[str, float]:
    """Seconds of an update of everything, and of all else that a run takes; bytes of a training step."""
    start, clock = now(task.device), Clock(task.device)
    model = fresh(task, row)
    trainer = new_trainer(task, row, model, REHEARSED, output, [clock], measure_memory=task.device == "cpu")
    trainer.train()
    step_bytes = bytes_of_step(task, trainer)
    evaluating = now(task.device)
    task.losses(trained(trainer), EVALUATED)
    evaluation = (now(task.device) - evaluating) / EVALUATED
    steps = len(clock.times) // REHEARSED  # of an update of everything
    timed = [after - before for before, after in zip(clock.times, clock.times[1:])][UNTIMED * steps - 1 :]
    rest = clock.times[0] - start + evaluation
    return {"update": steps * statistics.median(timed), "else": rest, "step bytes": step_bytes}


def bytes_of_step(task: Task, trainer: Trainer) -> int:
    """Of the block that needs most: what CUDA gave out at the peak; on a CPU by the ledger."""
    if task.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return max(ledger.total for ledger in ledgers_of(trainer))


def planned(task: Task, seconds: float, output: str) -> dict:
    """The number of updates with which all rows of a task take so many seconds, and what it was reckoned from."""
    start = now(task.device)
    rows = {name: rehearsed(task, row, output) for name, row in task.rows.items() if not row.equal_seconds}
    update, rest = (sum(found[key] for found in rows.values()) for key in ("update", "else"))
    if any(row.equal_seconds for row in task.rows.values()):
        update += slowest(task, rows, "update")
        rest += rows[next(iter(task.rows))]["else"]
    spent = now(task.device) - start
    updates = int((USED * seconds - spent - rest) / update)
    if updates < LEAST_UPDATES:
        raise SystemExit(f"scale.py: error: {task.name} has time for {updates} updates: give more --minutes")
    return {"updates": updates, "wall seconds": spent, "rows": rows}


def slowest(task: Task, rows: dict[str, dict], key: str) -> float:
    """The most of the rows of blocks."""
    return max(rows[name][key] for name, row in task.rows.items() if row.fields is not None)


# ---- runs


def run(task: Task, name: str, updates: int, output: str) -> dict:
    """Train a row and measure it."""
    start, row = now(task.device), task.rows[name]
    model = fresh(task, row)
    trainer = new_trainer(task, row, model, updates, output)
    begin = worked(task.device)
    trainer.train()
    seconds = worked(task.device) - begin
    losses = task.losses(trained(trainer)).double()
    return {
        "task": task.name, "row": name, "updates": updates, "layers": task.layers(row),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": losses.mean().item(), "standard error": standard_error(losses), "seconds": seconds,
        "a second": updates * task.items / seconds, "wall seconds": now(task.device) - start,
        "of each": [round(loss, 5) for loss in losses.tolist()],
    }  # fmt: skip


def standard_error(values: torch.Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


def cached(file: Path, make: Callable[[], dict]) -> dict:
    """What the file has; what `make()` gives, if there is none."""
    if not file.is_file():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def results_of(task: Task, seconds: float, folder: Path) -> tuple[dict, list[dict]]:
    """The plan of a task, and the results of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = cached(folder / "plan.json", partial(planned, task, seconds, str(folder)))
    print(f"{task.name}: {plan['updates']} updates, found in {plan['wall seconds']:.0f} s", flush=True)
    results: dict[str, dict] = {}
    for name, row in task.rows.items():
        updates, like = plan["updates"], name
        if row.equal_seconds:
            like = next(iter(task.rows))
            updates = round(updates * slowest(task, results, "seconds") / results[like]["seconds"])
        file = file_of(folder, task.rows, name, updates)
        results[name] = cached(file, partial(run, task, name, updates, str(folder)))
        results[name]["step bytes"] = plan["rows"][like]["step bytes"]
        print(line(task, results[name], results), flush=True)
    return plan, list(results.values())


# ---- the table

COLUMNS = (
    "", "layers", "M parameters", "updates", "loss", "over end to end", "seconds", "tokens or images a second",
    "MiB of a training step",
)  # fmt: skip


def line(task: Task, result: dict, results: dict[str, dict]) -> str:
    """A row of the table. What it is over end to end has the standard error of paired texts or images."""
    base = torch.tensor(results[next(iter(task.rows))]["of each"])
    more = torch.tensor(result["of each"]) - base
    over = f"{100 * more.mean() / base.mean():+.1f} ± {100 * standard_error(more) / base.mean():.1f} %"
    cells = [
        result["row"],
        str(result["layers"]),
        f"{result['parameters'] / 1e6:.3g}",
        str(result["updates"]),
        f"{result['loss']:.4f} ± {result['standard error']:.4f}",
        over if more.any() else "",
        f"{result['seconds']:.1f}",
        f"{result['a second']:,.0f}",
        f"{result['step bytes'] / 2**20:,.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def heading(task: Task, plan: dict) -> str:
    """Of a task's rows: its size, and what was chosen for the time."""
    size = task.size
    batch = f"{size.batch_size} x {size.length} tokens" if size.length > 1 else f"{size.batch_size} images"
    title = f"**{task.name}**: {task.unit}; width {size.width}, {plan['updates']} updates of {batch} were chosen"
    return f"| {title}{' |' * len(COLUMNS)}"


def machine(device: str) -> dict[str, str]:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}), one thread",
        "dtype": "bfloat16 (autocast), evaluated in float32" if cuda else "float32",
        "seconds": "of training, by the wall clock" if cuda else "of training, of CPU time",
        "torch": torch.__version__, "transformers": transformers.__version__, "hf_diffusionblocks": db.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="that the whole table may take")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--data", type=Path, required=True, help="file that scale_data.py has written")
    parser.add_argument("--output", type=Path, required=True, help="folder of plans, cached runs and the table")
    options = parser.parse_args()
    start = time.perf_counter()
    logging.set_verbosity_error()
    if options.device == "cpu":
        torch.set_num_threads(1)
    data = unpacked(options.data)
    about, results = {"minutes": options.minutes, **machine(options.device)}, []
    runs = options.output / f"{options.device}-{options.minutes:g}-minutes"
    seconds_left, shares_left = 60 * options.minutes - (time.perf_counter() - start), sum(task.share for task in TASKS)
    lines = ["; ".join(f"{key}: {value}" for key, value in about.items()), "", f"| {' | '.join(COLUMNS)} |"]
    lines.append("|---" * len(COLUMNS) + "|")
    for make_task in TASKS:
        task = make_task(data, options.device)
        seconds = seconds_left * task.share / shares_left
        plan, found = results_of(task, seconds, runs / task.name.replace(" ", "-"))
        # What a task took too long, or left, is the next one's. (Cached runs count as when they were made.)
        seconds_left -= plan["wall seconds"] + sum(result["wall seconds"] for result in found)
        shares_left -= task.share
        of_row = {result["row"]: result for result in found}
        lines += [heading(task, plan), *(line(task, result, of_row) for result in found)]
        results += [{key: value for key, value in result.items() if key != "of each"} for result in found]
    (options.output / "results.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    (options.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
