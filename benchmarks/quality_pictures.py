"""What each way to train reaches, and what it holds: the picture of docs/blocks.md, from the results beside this file.

python benchmarks/quality_pictures.py

Memory is that of a run that trains all blocks, as checkpointed_steps.py measures it, without checkpointing and, hollow, with it.
(Quality with it is the same.) Of pointers it is gradients and activations, without checkpointing only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib import rcParams
from matplotlib.figure import Figure
from pictures import INK, MUTED, QUIET

HERE = Path(__file__).parent
COLOURS = {"plain": "#7d8893", "own": "#d1495b"}
KINDS = {"plain": "a plain model", "own": "blocks, each on its own loss"}

#: Where a name is -> points from its mark, and its own alignment
SIDES = {"right": ((8, 0), "left", "center"), "above": ((6, 7), "right", "bottom"), "below": ((6, -7), "right", "top")}


@dataclass(frozen=True)
class Panel:
    """One task.

    Args:
        results: file of its runs.
        updates: of the runs that count.
        better: "up" or "down", of `value`; up is drawn up.
        value: of a run.
        rows: row of the results -> its name here, its kind, and where the name is, of [`SIDES`].
            The first is what memory is told relative to.
        task: its name in checkpointed_steps.json, or None.
    """

    title: str
    label: str
    results: str
    updates: int
    better: str
    value: Callable[[dict], float]
    rows: dict[str, tuple[str, str, str]]
    task: str | None

    def points(self) -> list[tuple[float, float | None, float, str, str, str]]:
        """Memory over the first row's, that with checkpointing, value, name, kind and side of each row; means over seeds."""
        runs = [run for run in runs_of(self.results) if run["updates"] == self.updates]
        whole = {run["row"]: run for run in runs_of("checkpointed_steps.json") if run["task"] == self.task}
        of_row = {row: [run for run in runs if run["row"] == row] for row in self.rows}
        base = next(iter(of_row.values()))[0]["step bytes"]
        points = []
        for row, found in of_row.items():
            step = whole.get(row, found[0])  # (of a plain model both say the same)
            checkpointed = step.get("step bytes, checkpointing")
            over = (step["step bytes"] / base, checkpointed and checkpointed / base)
            points.append((*over, mean(map(self.value, found)), *self.rows[row]))
        return points


def runs_of(results: str) -> list[dict]:
    return json.loads((HERE / "results" / results).read_text())


PANELS = (
    Panel(
        "Text, character by character", "bits a character", "quality_characters.json", 2000, "down",
        lambda run: run["logits"],
        {
            "end to end, 8 layers": ("8 layers", "plain", "right"),
            "end to end, 2 layers": ("2 layers", "plain", "right"),
            "B=4, own loss, no local head": ("B=4", "own", "right"),
            "B=4, own loss, local head of one layer": ("B=4, local heads", "own", "above"),
        },
        "characters",
    ),
    Panel(
        "Chasing pointers over 4 hops", "right answers, %", "depth_probe.json", 2000, "up", lambda run: 100 * run["logits"][-1],
        {
            "end to end, 8 layers": ("8 layers", "plain", "right"),
            "end to end, 2 layers": ("2 layers", "plain", "right"),
            "B=4, own loss, no local head": ("B=4", "own", "right"),
            "B=4, own loss, local head of one layer": ("B=4, local heads", "own", "right"),
            "B=2, own loss, local head of one layer": ("B=2, local head", "own", "right"),
        },
        None,
    ),
    Panel(
        "Masked text", "bits a character", "quality_masked.json", 3000, "down", lambda run: run["bits"],
        {
            "end to end, 6 layers": ("6 layers", "plain", "right"),
            "end to end, 2 layers": ("2 layers", "plain", "right"),
            "B=3 of 2 layers (paper)": ("B=3 of 2 layers", "own", "right"),
            "B=3 of 6 layers": ("B=3 of 6 layers", "own", "above"),
        },
        "masked text",
    ),
    Panel(
        "Images by diffusion", "Frechet distance", "quality_generation.json", 1500, "down", lambda run: run["frechet karras"],
        {
            "end to end, 6 layers": ("6 layers", "plain", "right"),
            "end to end, 2 layers": ("2 layers", "plain", "right"),
            "B=3 of 2 layers, own ends": ("B=3 of 2 layers", "own", "below"),
            "B=2 of 3 layers, own ends": ("B=2 of 3 layers", "own", "above"),
            "B=3 of 6 layers": ("B=3 of 6 layers", "own", "above"),
        },
        "images",
    ),
)  # fmt: skip


def draw(file: Path) -> None:
    figure = Figure(figsize=(10, 6.6), layout="constrained", facecolor="white")
    for panel, axes in zip(PANELS, figure.subplots(2, 2).flat):
        for memory, checkpointed, value, name, kind, side in panel.points():
            axes.plot(memory, value, "o", color=COLOURS[kind], markersize=7)
            if checkpointed:
                axes.plot([checkpointed, memory], [value, value], ":", color=COLOURS[kind], linewidth=1, zorder=0)
                axes.plot(checkpointed, value, "o", color=COLOURS[kind], markersize=7, markerfacecolor="white")
            away, across, along = SIDES[side]
            axes.annotate(name, (memory, value), away, textcoords="offset points", fontsize=9, color=INK, ha=across, va=along)
        axes.set_title(panel.title, fontsize=10, color=INK, loc="left")
        axes.set_ylabel(panel.label, fontsize=9, color=MUTED)
        axes.set_xlim(0, 1.25)
        axes.margins(y=0.15)
        if panel.better == "down":
            axes.invert_yaxis()
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.grid(color=QUIET, linewidth=0.4)
        held = "memory" if panel.task else "gradients and activations"
        axes.set_xlabel(f"{held} of a training step, over the plain model's", fontsize=9, color=MUTED)
    marks = [axes.plot([], [], "o", color=COLOURS[kind], label=label)[0] for kind, label in KINDS.items()]
    marks += axes.plot([], [], "o", color=MUTED, markerfacecolor="white", label="the same with checkpointing")
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "docs"})
    draw(HERE.parent / "docs" / "quality_and_memory.svg")
