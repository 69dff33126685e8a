"""Pictures of unlearning runs: farther, longer and slower, set by set."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks.common.report import markdown
from benchmarks.reproduce.judging.order import arrivals, beside_oracles
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


def table_of(panels: dict[str, Any], metrics: Sequence[str] = ()) -> str:
    """Return a Markdown table: what the runs did on the sets with something to forget.

    These are the sets with a mean gap of more than five points, the filled points of
    the picture.

    Args:
        panels: Panels by name.
        metrics: The metrics of the gap, a line for each; by default all.
    """
    head = [
        "runs",
        "sets with a gap",
        "gap before → after",
        "closed",
        "remaining on average",
        "came within five points",
        "ended there",
        "ended there, accuracy kept",
        "overshot",
        "test accuracy",
    ]
    rows = [
        [name if len(metrics) == 1 else f"{name}, {metric}", *_cells(one, metric)]
        for name, one in panels.items()
        for metric in metrics or one["gaps"]
    ]
    return markdown([head, *rows]) + "\n"


def _cells(panel: dict[str, Any], metric: str) -> list[str]:
    """Return the cells of one line; shares of the mean gap of these sets and runs."""
    runs = Runs.of_panel(panel, metric)
    judged = runs.of_sets()["initial"] > LEAST_GAP
    number = f"{judged.sum()} of {len(judged)}"
    if not judged.any():
        return [number, *[""] * 8]
    some = runs.only(judged)
    gap = some.to_go.mean((0, 1))
    shares = arrivals(runs, judged)
    kinds = "first", "there", "kept", "overshot"
    area = (gap[1:] + gap[:-1]).mean() / 2
    return [
        number,
        f"{gap[0]:.3f} → {gap[-1]:.3f}",
        f"{100 * (1 - gap[-1] / gap[0]):.0f} %",
        f"{100 * area / gap[0]:.0f} %",
        *(f"{100 * shares[kind]:.0f} %" for kind in kinds),
        beside_oracles(float(some.lost.mean())),
    ]
