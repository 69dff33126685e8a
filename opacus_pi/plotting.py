"""Figures of the paper: arrays in, matplotlib Axes out.

Colours are Okabe and Ito's, told apart by colour-blind readers; every curve has its
own marker; the spread over runs is always drawn.
"""

from collections.abc import Mapping
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from opacus_pi._validate import expect

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_time_to_unlearn(
    mean_losses: ArrayLike,
    times: Mapping[str, ArrayLike],
    *,
    max_time: float,
    unit: str = "epochs",
    ax: Axes | None = None,
) -> Axes:
    """Time to unlearn against the forget set's mean privacy loss (paper, Figure 1).

    Every run is a faint point, the mean over runs a line, its standard error a bar. A
    run that never came within the tolerance is a hollow point at ``max_time``, and
    counts as ``max_time`` in the mean, which is then a lower estimate.

    Args:
        mean_losses: Mean privacy loss of each run's forget sets, ``(runs, sets)``.
        times: For each measure its times to unlearn, ``(runs, sets)``; ``inf``: never.
        max_time: How long the runs unlearned.
        unit: Unit of the times.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If the shapes disagree.
    """
    ax = ax or plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1]
    losses = np.atleast_2d(np.asarray(mean_losses, dtype=np.float64))
    centre = np.exp(np.log(np.maximum(losses, np.finfo(float).tiny)).mean(0))
    styles = cycle(zip(COLOURS, MARKERS, strict=True))
    for (label, values), (colour, marker) in zip(times.items(), styles, strict=False):
        runs = np.atleast_2d(np.asarray(values, dtype=np.float64))
        expect(
            runs.shape == losses.shape,
            f"times[{label!r}]",
            f"an array of shape {runs.shape}",
            f"to have shape {losses.shape}",
            "One time per run and forget set.",
        )
        _runs(ax, losses, runs, max_time, colour, marker)
        mean, error = _mean_and_error(np.minimum(runs, max_time))
        style = {"color": colour, "marker": marker, "label": label, "capsize": 3}
        ax.errorbar(centre, mean, error, **style)
    ax.set_xscale("log")
    ax.set_xlabel("mean privacy loss of the forget set")
    ax.set_ylabel(f"{unit} to unlearn")
    ax.legend(frameon=False)
    return ax


def _runs(
    ax: Axes, x: NDArray, y: NDArray, top: float, colour: str, marker: str
) -> None:
    """Each run as a faint point; hollow at the top where it never arrived."""
    never = ~np.isfinite(y)
    ax.scatter(x[~never], y[~never], s=14, c=colour, marker=marker, alpha=0.35, lw=0)
    style = {"marker": marker, "facecolors": "none", "edgecolors": colour}
    ax.scatter(x[never], np.full(never.sum(), top), s=22, alpha=0.7, **style)


def _mean_and_error(runs: NDArray) -> tuple[NDArray, NDArray]:
    """Mean over runs and its standard error (0 for one run)."""
    num_runs = len(runs)
    spread = runs.std(0, ddof=1) if num_runs > 1 else np.zeros(runs.shape[1])
    return runs.mean(0), spread / np.sqrt(num_runs)
