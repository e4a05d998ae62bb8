"""The picture of docs/report.md, from the results beside this file.

python benchmarks/report_pictures.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import INK, MUTED, QUIET

HERE = Path(__file__).parent
PLAIN, PAPER, RECOMMENDED = "#7d8893", "#e0a458", "#d1495b"

#: Row and reading of quality_paper.json -> name, colour, style of its line
CURVES = {
    ("fashion, end to end", "logits"): ("end to end, 6 layers", PLAIN, "-"),
    ("fashion, end to end, one block's depth", "logits"): ("end to end, 2 layers", PLAIN, ":"),
    ("fashion, recommended", "logits"): ("recommended, B=3", RECOMMENDED, "-"),
    ("fashion, paper", "block 0"): ("paper, block 0 alone", PAPER, "-"),
    ("fashion, paper", "walk T=2"): ("paper, walk of 2 steps", PAPER, "--"),
    ("fashion, paper", "walk T=3"): ("paper, walk of 3 steps", PAPER, ":"),
}
#: Row of quality_characters.json, updates, reading -> name, colour
BARS = {
    ("B=4, the paper's settings", 2000, "block 0"): ("paper, block 0 alone", PAPER),
    ("end to end, 2 layers", 2000, "logits"): ("end to end, 2 layers", PLAIN),
    ("B=4, own loss, no local head", 2000, "logits"): ("B=4, no local head", RECOMMENDED),
    ("B=8, own loss, local head of one layer", 2000, "logits"): ("B=8, local heads", RECOMMENDED),
    ("B=4, own loss, local head of one layer, own ends", 2000, "logits"): ("B=4, local heads, own ends", RECOMMENDED),
    ("B=4, own loss, local head of one layer", 2000, "logits"): ("B=4, local heads (recommended)", RECOMMENDED),
    ("B=2, own loss, local head of one layer", 2000, "logits"): ("B=2, local head", RECOMMENDED),
    ("end to end, 8 layers", 2600, "logits"): ("end to end, 1.3x the updates", PLAIN),
}


def runs_of(results: str) -> list[dict]:
    return json.loads((HERE / "results" / results).read_text())


def draw_curves(axes: Axes) -> None:
    """Means over seeds, and from the worst to the best of them."""
    runs = runs_of("quality_paper.json")
    for (row, reading), (name, colour, style) in CURVES.items():
        of_seeds = [run for run in runs if run["row"] == row]
        updates = [point["share"] * of_seeds[0]["updates"] for point in of_seeds[0]["curve"]]
        values = list(zip(*([point[reading] for point in run["curve"]] for run in of_seeds)))
        axes.plot(updates, list(map(mean, values)), style, color=colour, label=name, linewidth=1.6)
        axes.fill_between(updates, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12, linewidth=0)
    axes.set_title("Fashion-MNIST by a ViT, three seeds", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("updates of every parameter", fontsize=9, color=MUTED)
    axes.set_ylabel("test accuracy, %", fontsize=9, color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")


def draw_bars(axes: Axes) -> None:
    """Means over seeds of what a row reads over end to end with the same seed; a dot a seed."""
    runs = runs_of("quality_characters.json")
    base = {run["seed"]: run["logits"] for run in runs if run["row"] == "end to end, 8 layers" and run["updates"] == 2000}
    for height, ((row, updates, reading), (name, colour)) in enumerate(reversed(BARS.items())):
        found = [run for run in runs if run["row"] == row and run["updates"] == updates]
        over = [100 * (run[reading] / base[run["seed"]] - 1) for run in found]
        axes.barh(height, mean(over), color=colour, height=0.6)
        axes.plot(over, [height] * len(over), "o", color=INK, markersize=3)
        side = 6 if max(over) > 0 else -6
        at = max(over) if side > 0 else min(over)
        axes.annotate(
            f"{round(mean(over), 1) + 0.0:+}", (at, height), (side, 0), textcoords="offset points", fontsize=8, color=INK,
            va="center", ha="left" if side > 0 else "right",
        )  # fmt: skip
    axes.set_yticks(range(len(BARS)), [name for name, _ in reversed(BARS.values())])
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.margins(x=0.14)
    axes.set_title("Characters by a Llama of 8 layers, a dot a seed", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("bits a character over end to end, %", fontsize=9, color=MUTED)


def draw(file: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    for axes, panel in zip(figure.subplots(1, 2), (draw_curves, draw_bars)):
        panel(axes)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.grid(color=QUIET, linewidth=0.4)
        axes.set_axisbelow(True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "docs"})
    draw(HERE.parent / "docs" / "report.svg")
