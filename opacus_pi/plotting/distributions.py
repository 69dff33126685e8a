"""Histogram of one number over examples."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.plotting.style import COLOURS, axes_or_new

_DECADES = 20.0  # with a larger ratio of largest to smallest the axis is logarithmic
_NARROW = 1e4  # with a smaller ratio more than powers of ten get a label


def plot_distribution(
    values: ArrayLike,
    *,
    name: str,
    marks: Mapping[str, float] | None = None,
    num_bins: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Plot a histogram over examples, with lines at numbers to compare with.

    The axis is logarithmic if the values are positive and span more than a factor of
    20. Infinite values are not drawn; the label of the axis gives their number.

    Args:
        values: One number per example, ``(n,)``, at least one finite.
        name: Meaning of the numbers, for the axis.
        marks: Numbers at which to draw a dashed line, by name; those that are not
            finite are not drawn.
        num_bins: Number of bars.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If no value is finite.
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    finite = numbers[np.isfinite(numbers)]
    expect(
        finite.size > 0,
        "values",
        f"{numbers.size} numbers",
        "must contain a finite number",
        "There is no distribution to draw.",
    )
    ax = axes_or_new(ax)
    shown = {k: v for k, v in (marks or {}).items() if np.isfinite(v)}
    logarithmic = finite.min() > 0 and finite.max() > _DECADES * finite.min()
    if logarithmic:
        ax.set_xscale("log")
        _name_few_ticks(ax, finite.max() / finite.min())
    space = np.geomspace if logarithmic else np.linspace
    low, high = finite.min(), finite.max()
    width = 0.0 if high > low else 0.5
    edges = space(low - width, high + width, num_bins + 1)
    ax.hist(finite, bins=edges.tolist(), color=COLOURS[0], alpha=0.75)
    for (label, value), colour in zip(shown.items(), COLOURS[1:], strict=False):
        ax.axvline(value, color=colour, lw=1.5, ls=(0, (4, 3)), label=label)
    left_out = numbers.size - finite.size
    ax.set_xlabel(f"{name} ({left_out} infinite, not shown)" if left_out else name)
    ax.set_ylabel("examples")
    if shown:
        ax.legend(frameon=False, fontsize="small")
    return ax


def _name_few_ticks(ax: Axes, span: float) -> None:
    """Label a logarithmic axis so that the labels do not overlap."""
    ax.xaxis.set_minor_formatter(NullFormatter())
    if span < _NARROW:
        subs = (1.0, 2.0, 5.0) if span < _NARROW / 10 else (1.0, 3.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
