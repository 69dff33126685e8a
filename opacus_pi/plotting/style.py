"""Colours, markers and drawing functions that all figures share.

The look of the paper's figures is decided here, so that they look alike when they stand
side by side. A figure's own file decides what is drawn.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy import stats

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect

Array = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the given Axes, or those of a new figure.

    Args:
        ax: The caller's Axes; None makes a figure of 5.2 by 3.6 inches.
    """
    return ax or plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1]


def styles() -> Iterator[dict[str, Any]]:
    """Return colour and marker of the first curve, the second, and so on.

    After seven curves they begin again, and two curves look alike.
    """
    pairs = zip(COLOURS, MARKERS, strict=True)
    return cycle([{"color": c, "marker": m} for c, m in pairs])


def runs_and_sets(
    name: str, values: ArrayLike, shape: tuple[int, ...] | None = None
) -> Array:
    """Return numbers as an array ``(runs, sets)``, after checking its shape.

    Args:
        name: Name of the argument, for errors.
        values: The numbers; a single run may have shape ``(sets,)``.
        shape: The required shape; ``None`` allows any.

    Raises:
        ValueError: If the array is empty or has another shape.
    """
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    expect(
        array.ndim == 2 and array.size > 0 and shape in (None, array.shape),
        name,
        f"an array of shape {array.shape}",
        f"must have shape {shape or '(runs, sets)'}",
        "Pass one number per run and forget set.",
    )
    return array


def runs_at(name: str, values: ArrayLike, num_places: int) -> Array:
    """Return numbers as an array ``(runs, places)``, after checking its shape.

    For arguments whose number of runs is free, but not their number of sets, sizes or
    times.

    Args:
        name: Name of the argument, for errors.
        values: The numbers; a single run may have shape ``(places,)``.
        num_places: How many numbers each run must have.

    Raises:
        ValueError: If a run has another length.
    """
    runs = runs_and_sets(name, values)
    return runs_and_sets(name, runs, (len(runs), num_places))


def centre_of(losses: Array) -> Array:
    """Return the geometric mean over runs of the loss of each set, ``(sets,)``.

    It is the middle of the points on a logarithmic axis, where the arithmetic mean
    would be too far right. A loss of 0 has no place there: it counts as the smallest
    positive loss of all runs and sets.

    Args:
        losses: Mean privacy losses, ``(runs, sets)``.
    """
    positive = losses[losses > 0]
    floor = positive.min() if positive.size else 1.0
    result: Array = np.exp(np.log(np.maximum(losses, floor)).mean(0))
    return result


def draw_runs(
    ax: Axes, x: Array, y: Array, style: dict[str, Any], top: float = np.inf
) -> None:
    """Draw runs as faint points, or as hollow ones at ``top`` if y is infinite.

    Args:
        ax: Where to draw.
        x: Place of each point, ``(runs, sets)``.
        y: Height of each point, ``(runs, sets)``; infinite for a run that never
            arrived.
        style: Colour and marker.
        top: Height of the hollow points: the length of the runs.
    """
    never, colour, marker = ~np.isfinite(y), style["color"], style["marker"]
    ax.scatter(x[~never], y[~never], s=14, c=colour, marker=marker, alpha=0.35, lw=0)
    if never.any():
        hollow = {"marker": marker, "facecolors": "none", "edgecolors": colour}
        ax.scatter(x[never], np.full(never.sum(), top), s=22, alpha=0.7, **hollow)


def draw_means(
    ax: Axes,
    x: Array,
    runs: Array,
    label: str,
    style: dict[str, Any],
    floor: float = -np.inf,
) -> None:
    """Draw the mean over runs; for several runs also Student's 95 % interval.

    Args:
        ax: Where to draw.
        x: Place of each set, ``(sets,)``.
        runs: Finite heights, ``(runs, sets)``.
        label: Name in the legend.
        style: Colour, marker and line.
        floor: Where the interval is cut off below; 0 for times, which are not negative.
    """
    mean, error = runs.mean(0), np.zeros(runs.shape[1])
    if len(runs) > 1:
        error = stats.t.ppf(0.975, len(runs) - 1) * stats.sem(runs, axis=0)
    ends = np.array([np.minimum(error, mean - floor), error])
    ax.errorbar(x, mean, ends, label=label, capsize=3, **style)


def nested(count: int) -> list[dict[str, float]]:
    """Return sizes for overlapping curves: a curve below another is drawn larger.

    Times to unlearn are whole numbers of epochs, so two methods often have the same
    curve. If both were drawn in one size, the first would be invisible.

    Args:
        count: Number of curves.

    Returns:
        Sizes of marker, line and bar for each curve, in drawing order.
    """
    return [
        {"markersize": 5 + 2.5 * level, "linewidth": 1 + 1.4 * level, "elinewidth": 1}
        for level in reversed(range(count))
    ]


def mark_never(ax: Axes, never: bool, max_time: float, unit: str) -> None:
    """Use whole numbers on the axis; mark the end of runs that never arrived.

    Args:
        ax: Where to draw.
        never: Whether some run never arrived; without one there is no mark.
        max_time: Length of the runs.
        unit: Unit of the times.
    """
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if never:
        text = f"never within {max_time:g} {unit}"
        ax.axhline(max_time, color=GREY, lw=1, linestyle=(0, (1, 2)), zorder=0)
        ax.annotate(
            text,
            (0, max_time),
            xycoords=("axes fraction", "data"),
            xytext=(4, 7),
            textcoords="offset points",
            fontsize="small",
            color=GREY,
        )
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.08 * (high - low))


def losses_below(ax: Axes) -> None:
    """Make the x axis one of privacy losses: logarithmic, with a label.

    Losses of sets from easy to hard span orders of magnitude. In the paper the time to
    unlearn grows with the logarithm of the loss, a straight line on this axis.
    """
    ax.set_xscale("log")
    ax.set_xlabel("mean privacy loss of the forget set")
