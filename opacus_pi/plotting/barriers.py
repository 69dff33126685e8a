"""Loss barriers between unlearned and retrained models: Figure 1 (right)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.plotting.style import (
    GREY,
    Array,
    axes_or_new,
    centre_of,
    draw_means,
    draw_runs,
    losses_below,
    runs_and_sets,
    styles,
)


def plot_barriers(
    mean_losses: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    baseline: ArrayLike,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot loss barriers to retrained models before and after unlearning.

    Faint points are single runs, lines are means over runs, and bars are Student's 95 %
    intervals. The band is the baseline, mean ± one standard deviation over pairs.

    Args:
        mean_losses: Mean privacy loss of each run's forget sets, ``(runs, sets)``.
        before: Barriers between the trained and a retrained model, ``(runs, sets)``.
        after: Barriers between the unlearned and a retrained model, the same shape.
        baseline: Barriers between pairs of retrained models: ``(pairs, sets)`` if every
            forget set has its own pairs, otherwise all barriers in any shape.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If the shapes disagree or there is no baseline.

    Source: paper, Figure 1 (right) and Section 6.2.
    """
    ax = axes_or_new(ax)
    losses = runs_and_sets("mean_losses", mean_losses)
    pairs = np.asarray(baseline, dtype=np.float64)
    expect(
        pairs.size > 0,
        "baseline",
        "[]",
        "must contain a barrier",
        "Retrain two models on the same retain set.",
    )
    _draw_baseline(ax, centre_of(losses), pairs)
    named = {"before": before, "after": after}
    for (name, values), style in zip(named.items(), styles(), strict=False):
        runs = runs_and_sets(name, values, losses.shape)
        draw_runs(ax, losses, runs, style)
        draw_means(ax, centre_of(losses), runs, f"{name} unlearning", style)
    losses_below(ax)
    ax.set_ylabel("loss barrier to a retrained model")
    ax.legend(frameon=False)
    return ax


def _draw_baseline(ax: Axes, centre: Array, pairs: Array) -> None:
    """Draw one band for all sets, or a band with its own value at each set.

    Args:
        ax: Where to draw.
        centre: Mean loss of each set, ``(sets,)``, the places on the x axis.
        pairs: Barriers between retrained models. With two dimensions, of which the
            second has one column for each set, every set gets its own value; else all
            barriers are one sample, in whatever shape they come.
    """
    of_sets = pairs.ndim == 2 and pairs.shape[1] == len(centre)
    columns = pairs if of_sets else pairs.reshape(-1, 1)
    mean, spread = columns.mean(0), columns.std(0)
    look: dict[str, Any] = {"color": GREY, "alpha": 0.25, "lw": 0}
    look["label"] = "between retrained models"
    if of_sets:
        ax.fill_between(centre, mean - spread, mean + spread, **look)
        ax.plot(centre, mean, color=GREY, lw=1)
    else:
        ax.axhspan(float(mean[0] - spread[0]), float(mean[0] + spread[0]), **look)
        ax.axhline(float(mean[0]), color=GREY, lw=1)
