"""Pictures of unlearning runs: farther, longer and slower, set by set."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks.common.report import markdown
from benchmarks.reproduce.judging.order import arrivals
from benchmarks.reproduce.judging.runs import LEAST_GAP, Runs
from opacus_pi.plotting.style import styles

ROWS = {
    "initial": "gap before unlearning",
    "area": "area under the gap\n(gap × epochs)",
    "remaining": "share of the gap that\nremained on average",
}


def draw_panels(panels: dict[str, Any]) -> Picture:
    """Draw a column for each panel: gap before, area under the gap, and their ratio.

    Points are means over the seeds of a forget set. Sets that start within five points
    of their oracles are hollow, and have no ratio.
    """
    columns = max(1, len(panels))
    picture, axes = plt.subplots(
        len(ROWS),
        columns,
        figsize=(3.9 * columns, 6.6),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, (title, panel) in zip(axes.T, panels.items(), strict=False):
        _draw_column(column, panel)
        column[0].set_title(title, fontsize="medium")
        column[-1].set_xlabel("mean privacy loss of the set")
    for ax, label in zip(axes[:, 0], ROWS.values(), strict=True):
        ax.set_ylabel(label)
    return picture


def _draw_column(column: np.ndarray, panel: dict[str, Any]) -> None:
    for (metric, _), style in zip(panel["gaps"].items(), styles(), strict=False):
        runs = Runs.of_panel(panel, metric)
        sets, judged = runs.of_sets(), runs.of_sets()["initial"] > LEAST_GAP
        for ax, name in zip(column, ROWS, strict=True):
            values = np.where(judged | (name != "remaining"), sets[name], np.nan)
            _draw_points(ax, runs.difficulty, values, judged, metric, style)
    column[0].axhline(LEAST_GAP, color="grey", lw=0.8, ls=":")
    column[0].legend(frameon=False, fontsize="small")


def _draw_points(
    ax: Axes,
    losses: np.ndarray,
    values: np.ndarray,
    judged: np.ndarray,
    label: str,
    style: dict[str, Any],
) -> None:
    ax.plot(losses, values, label=label, **(style | {"mfc": "white"}))
    filled = np.where(judged, values, np.nan)
    ax.plot(losses, filled, **(style | {"ls": "none"}))
    if (losses > 0).all():
        ax.set_xscale("log")


def table_of(panels: dict[str, Any], metric: str) -> str:
    """Return a Markdown table: a line per panel, on the sets with something to forget.

    Args:
        panels: Panels by name.
        metric: The metric of the gap.
    """
    head = [
        "run",
        f"sets with a gap by {metric}",
        "gap before → after",
        "closed",
        "remaining on average",
        "ended within five points, accuracy kept",
        "overshot",
        "test accuracy below oracles'",
    ]
    rows = [head, *([name, *_cells(one, metric)] for name, one in panels.items())]
    return markdown(rows) + "\n"


def _cells(panel: dict[str, Any], metric: str) -> list[str]:
    """Return the cells of one panel; means over seeds and sets."""
    runs = Runs.of_panel(panel, metric)
    sets = runs.of_sets()
    judged = sets["initial"] > LEAST_GAP
    number = f"{judged.sum()} of {len(judged)}"
    if not judged.any():
        return [number, *[""] * 6]
    final = np.abs(runs.gaps[:, judged, -1]).mean()
    shares = arrivals(runs, judged)
    return [
        number,
        f"{sets['initial'][judged].mean():.3f} → {final:.3f}",
        f"{100 * sets['closed'][judged].mean():.0f} %",
        f"{100 * sets['remaining'][judged].mean():.0f} %",
        f"{100 * shares['kept']:.0f} %",
        f"{100 * shares['overshot']:.0f} %",
        f"{100 * runs.lost[:, judged].mean():.1f} points",
    ]
