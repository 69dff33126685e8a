"""Time to unlearn: Figures 1 (left and middle), 3 and 6-8.

A run that never came near the retrained models has no time. To leave it out of the mean
would make the hardest sets look easy, so it is drawn hollow at the end of the runs and
counted as their length; a dotted line says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from opacus_pi._types import ArrayLike
from opacus_pi.plotting.style import (
    Array,
    axes_or_new,
    centre_of,
    draw_means,
    draw_runs,
    losses_below,
    mark_never,
    nested,
    runs_and_sets,
    runs_at,
    styles,
)


def plot_time_to_unlearn(
    mean_losses: ArrayLike,
    times: Mapping[str, ArrayLike],
    *,
    max_time: float,
    unit: str = "epochs",
    ax: Axes | None = None,
) -> Axes:
    """Plot the time to unlearn against the mean privacy loss of the forget set.

    Faint points are single runs, lines are means over runs, and bars are Student's 95 %
    intervals, cut at 0. If curves coincide, the earlier one is visible around the later
    one. A run that never came within the tolerance is a hollow point on a dotted line
    at ``max_time``. It counts as ``max_time`` in the mean, which then is too low.

    Args:
        mean_losses: Mean privacy loss of each run's forget sets, ``(runs, sets)``.
        times: Times to unlearn for each curve (a metric, noise level, method or data
            set), ``(runs, sets)``; ``inf`` means never.
        max_time: Length of the runs.
        unit: Unit of the times.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If the shapes disagree.

    Source: paper, Figures 1 (left and middle), 6, 7 and 8.
    """
    ax = axes_or_new(ax)
    losses = runs_and_sets("mean_losses", mean_losses)
    centre, sizes, never = centre_of(losses), nested(len(times)), False
    for (label, values), style, size in zip(
        times.items(), styles(), sizes, strict=False
    ):
        runs = runs_and_sets(f"times[{label!r}]", values, losses.shape)
        never |= _draw_curve(ax, losses, centre, runs, max_time, label, style | size)
    losses_below(ax)
    mark_never(ax, never, max_time, unit)
    ax.set_ylabel(f"{unit} to unlearn")
    ax.legend(frameon=False)
    return ax


def plot_hardest_sets(
    sizes: Sequence[int],
    times: Mapping[str, ArrayLike],
    *,
    max_time: float,
    unit: str = "epochs",
    ax: Axes | None = None,
) -> Axes:
    """Plot the time to unlearn the hardest sets by several scores, at several sizes.

    The elements are those of ``plot_time_to_unlearn``; the scores are side by side at
    each size.

    Args:
        sizes: The s sizes of the forget sets.
        times: Times to unlearn the hardest sets by each score, ``(runs, s)``.
        max_time: Length of the runs.
        unit: Unit of the times.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes; size number k is at x = k.

    Raises:
        ValueError: If there is not one time per size.

    Source: paper, Figure 3.
    """
    ax = axes_or_new(ax)
    places = np.arange(len(sizes), dtype=np.float64)
    offsets = 0.12 * (np.arange(len(times)) - (len(times) - 1) / 2)
    never = False
    for (label, values), style, offset in zip(
        times.items(), styles(), offsets, strict=False
    ):
        runs = runs_at(f"times[{label!r}]", values, len(sizes))
        centre = places + offset
        x = np.broadcast_to(centre, runs.shape)
        points = {"linestyle": "none", **style}
        never |= _draw_curve(ax, x, centre, runs, max_time, label, points)
    ax.set_xticks(places, [f"{size:,}" for size in sizes])
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    mark_never(ax, never, max_time, unit)
    ax.set_xlabel("size of the forget set")
    ax.set_ylabel(f"{unit} to unlearn")
    ax.legend(frameon=False, title="hardest by")
    return ax


def _draw_curve(
    ax: Axes,
    x: Array,
    centre: Array,
    runs: Array,
    max_time: float,
    label: str,
    style: dict[str, Any],
) -> bool:
    """Draw the runs and the mean of one curve; infinite times are drawn at the end.

    Args:
        ax: Where to draw.
        x: Place of each run, ``(runs, sets)``.
        centre: Place of each mean, ``(sets,)``.
        runs: Times to unlearn, ``(runs, sets)``; ``inf`` means never.
        max_time: Length of the runs.
        label: Name in the legend.
        style: Colour, marker and line.

    Returns:
        Whether a run never arrived.
    """
    draw_runs(ax, x, runs, style, max_time)
    draw_means(ax, centre, np.minimum(runs, max_time), label, style, floor=0.0)
    return bool(np.isinf(runs).any())
