"""Pictures: how the noise is cut into blocks.

Figures are drawn without pyplot, so they need no display and leave no global state behind.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_diffusionblocks.extras import from_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_diffusionblocks.diffusion.schedule import NoiseSchedule

INK, MUTED, QUIET = "#22303c", "#66727e", "#c3ccd4"


def _figure(width: float, height: float) -> Figure:
    with from_extra("matplotlib", "hf_diffusionblocks.recipes.plots"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=MUTED, labelsize=8, length=3)


# ---- the partition


def plot_noise_partition(schedule: NoiseSchedule, path: str | PathLike) -> None:
    """Draw the density of the noise over ln sigma, and the intervals that the blocks own and train on.

    Args:
        schedule: of a model, `model.noise_schedule`.
        path: of the picture; its suffix gives the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    num_blocks = schedule.num_blocks
    rows_height = 0.25 + 0.28 * num_blocks
    figure = _figure(9, 3.2 + rows_height)
    density, intervals = figure.subplots(2, sharex=True, height_ratios=[2.5, rows_height])
    colors = _block_colors(num_blocks)
    _draw_density(density, schedule, colors)
    for block, color in enumerate(colors):
        _draw_interval(intervals, schedule, block, color)
    for boundary in schedule.boundaries[1:-1].log().tolist():
        for axes in (density, intervals):
            axes.axvline(boundary, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))

    _bare(intervals)
    intervals.set_ylim(num_blocks - 0.4, -0.6)  # block 0 on top
    names = ["block {}: σ {:.3g} to {:.3g}".format(block, *schedule.interval(block)) for block in range(num_blocks)]
    intervals.set_yticks(range(num_blocks), names)
    intervals.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
    decades = [10.0**power for power in range(-4, 4)]
    # The ends of the range, and the decades that leave them room.
    ticks = [s for s in decades if 1.3 * schedule.sigma_min < s < schedule.sigma_max / 1.3]
    ticks = [schedule.sigma_min, *ticks, schedule.sigma_max]
    intervals.set_xticks(np.log(ticks), [f"{sigma:g}" for sigma in ticks])
    intervals.set_xlim(np.log(schedule.sigma_min), np.log(schedule.sigma_max))
    hatched = "; hatched: overlap, trained on as well" if schedule.overlap and num_blocks > 1 else ""
    intervals.set_xlabel(f"noise level σ (logarithmic){hatched}", color=MUTED, fontsize=9)
    density.set_title("Blocks of equal probability; the first layers take the highest noise", color=INK, fontsize=11)
    figure.savefig(path, dpi=150)


def _block_colors(num_blocks: int) -> list:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.75 - 0.6 * block / max(num_blocks - 1, 1)) for block in range(num_blocks)]


def _draw_density(axes: Axes, schedule: NoiseSchedule, colors: list) -> None:
    ends = np.log([schedule.sigma_min, schedule.sigma_max])
    log_sigma = torch.linspace(*ends, 2001, dtype=torch.float64)
    # The slope of the CDF: right for every kind of schedule.
    density = torch.gradient(schedule.cdf(log_sigma.exp()), spacing=(log_sigma,))[0].numpy()
    log_sigma = log_sigma.numpy()
    for block, color in enumerate(colors):
        low, high = np.log(schedule.interval(block))
        inside = (log_sigma >= low - 0.01) & (log_sigma <= high + 0.01)
        axes.fill_between(log_sigma, density, where=inside, color=color, linewidth=0)
        middle = 1 - (block + 0.5) / schedule.num_blocks  # the block's median
        middle = float(schedule.quantile(torch.tensor(middle)).log())
        name = f"block {block}" if schedule.num_blocks <= 3 else str(block)
        axes.text(middle, 0.06 * density.max(), name, color="white", fontsize=10, ha="center", weight="bold")
    axes.plot(log_sigma, density, color=INK, linewidth=1.2)
    _bare(axes)
    axes.set_ylim(0, 1.08 * density.max())
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.set_ylabel("density of ln σ", color=MUTED, fontsize=9)


def _draw_interval(axes: Axes, schedule: NoiseSchedule, block: int, color) -> None:
    """A block's own interval in full colour, its overlap with its neighbours hatched."""
    own = np.log(schedule.interval(block))
    trained = np.log(schedule.interval(block, schedule.overlap))
    axes.barh(block, own[1] - own[0], left=own[0], height=0.62, color=color)
    for low, high in ((trained[0], own[0]), (own[1], trained[1])):
        axes.barh(block, high - low, left=low, height=0.62, facecolor="white", edgecolor=color, hatch="/////")
