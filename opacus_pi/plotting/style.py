"""What all figures share: colours, markers, runs as points, means with their error."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect

Array = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"


def axes_or_new(ax: Axes | None) -> Axes:
    """The Axes given, or those of a new figure."""
    return ax or plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1]


def styles() -> Iterator[dict[str, Any]]:
    """Colour and marker of each curve, in turn."""
    pairs = zip(COLOURS, MARKERS, strict=True)
    return cycle([{"color": c, "marker": m} for c, m in pairs])


def runs_and_sets(
    name: str, values: ArrayLike, shape: tuple[int, ...] | None = None
) -> Array:
    """Checked numbers ``(runs, sets)``; one run may be given flat.

    Args:
        name: The argument's name.
        values: The numbers.
        shape: The shape that they must have; any if None.
    """
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    expect(
        array.ndim == 2 and array.size > 0 and shape in (None, array.shape),
        name,
        f"an array of shape {array.shape}",
        f"to have shape {shape or '(runs, sets)'}",
        "Pass one number per run and forget set.",
    )
    return array


def centre_of(losses: Array) -> Array:
    """The geometric mean over runs of each set's loss, ``(sets,)``."""
    positive = losses[losses > 0]
    floor = positive.min() if positive.size else 1.0
    result: Array = np.exp(np.log(np.maximum(losses, floor)).mean(0))
    return result


def draw_runs(
    ax: Axes, x: Array, y: Array, style: dict[str, Any], top: float = np.inf
) -> None:
    """Each run as a faint point; hollow at ``top`` where y is not finite."""
    never, colour, marker = ~np.isfinite(y), style["color"], style["marker"]
    ax.scatter(x[~never], y[~never], s=14, c=colour, marker=marker, alpha=0.35, lw=0)
    if never.any():
        hollow = {"marker": marker, "facecolors": "none", "edgecolors": colour}
        ax.scatter(x[never], np.full(never.sum(), top), s=22, alpha=0.7, **hollow)


def draw_means(
    ax: Axes, x: Array, runs: Array, label: str, style: dict[str, Any]
) -> None:
    """The mean over runs, with its standard error (none for one run)."""
    spread = runs.std(0, ddof=1) if len(runs) > 1 else np.zeros(runs.shape[1])
    error = spread / np.sqrt(len(runs))
    ax.errorbar(x, runs.mean(0), error, label=label, capsize=3, **style)


def losses_below(ax: Axes) -> None:
    """The axis of privacy losses: logarithmic, named."""
    ax.set_xscale("log")
    ax.set_xlabel("mean privacy loss of the forget set")
