"""One metric during unlearning: Figure 5."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from opacus_pi._types import ArrayLike
from opacus_pi.plotting.style import axes_or_new, runs_at, styles


def plot_curves(
    times: ArrayLike,
    curves: Mapping[str, ArrayLike],
    oracles: Mapping[str, ArrayLike] | None = None,
    *,
    metric: str,
    unit: str = "epochs",
    ax: Axes | None = None,
) -> Axes:
    """Plot a metric during unlearning, with one curve for each forget set.

    Curves are means over runs with a band of ± one standard deviation. The dashed line
    of the same colour is the mean over models retrained without that set.

    Args:
        times: Times of the evaluations, ``(k,)``.
        curves: For each forget set the metric, ``(runs, k)``.
        oracles: For each forget set the metric of the retrained models, any shape.
        metric: Name of the metric, for the axis.
        unit: Unit of the times.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If there is not one value per time.

    Source: paper, Figure 5.
    """
    ax = axes_or_new(ax)
    times = np.asarray(times, dtype=np.float64)
    oracles = oracles or {}
    marked = max(1, len(times) // 8)
    for (label, values), style in zip(curves.items(), styles(), strict=False):
        runs = runs_at(f"curves[{label!r}]", values, len(times))
        mean, spread, colour = runs.mean(0), runs.std(0), style["color"]
        ax.fill_between(times, mean - spread, mean + spread, color=colour, alpha=0.15)
        ax.plot(times, mean, label=label, ms=4, markevery=marked, **style)
        if label in oracles:
            level = float(np.mean(np.asarray(oracles[label])))
            ax.axhline(level, color=colour, lw=1.2, linestyle=(0, (4, 3)))
    handles, _ = ax.get_legend_handles_labels()
    if oracles:
        dashes = Line2D([], [], color="black", lw=1.2, linestyle=(0, (4, 3)))
        dashes.set_label("retrained")
        handles.append(dashes)
    ax.legend(handles=handles, fontsize="small", framealpha=0.85, edgecolor="none")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(unit)
    ax.set_ylabel(metric)
    return ax
