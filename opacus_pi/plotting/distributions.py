"""Histogram of one number over examples."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.plotting.style import COLOURS, Array, axes_or_new

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

    A number to compare with that lies further right than three times the width of the
    histogram is written into the legend, so that the histogram stays visible.

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
        f"{numbers.size} numbers, none of them finite",
        "must contain a finite number",
        "Leave this figure out: there is no distribution to draw.",
    )
    ax = axes_or_new(ax)
    edges = _edges(ax, finite, num_bins)
    ax.hist(finite, bins=edges.tolist(), color=COLOURS[0], alpha=0.75)
    right = _right_end(ax, edges)
    shown = {k: v for k, v in (marks or {}).items() if np.isfinite(v)}
    for (label, value), colour in zip(shown.items(), COLOURS[1:], strict=False):
        if value > right:
            ax.plot([], [], " ", label=f"{label}: {value:.2g}, further right")
            continue
        ax.axvline(value, color=colour, lw=1.5, ls=(0, (4, 3)), label=label)
    left_out = numbers.size - finite.size
    ax.set_xlabel(f"{name} ({left_out} infinite, not shown)" if left_out else name)
    ax.set_ylabel("examples")
    if shown:
        ax.legend(
            frameon=False,
            fontsize="small",
            ncols=len(shown),
            loc="lower left",  # of the legend, at the upper left corner of the axes
            bbox_to_anchor=(0.0, 1.0),
        )
    return ax


def _edges(ax: Axes, finite: Array, num_bins: int) -> Array:
    """Return the edges of the bars, after choosing the scale of the axis.

    With a logarithmic axis the bars have equal width on the paper, not in the unit of
    the values. Equal widths in the unit would put nearly all examples into the first
    bar.

    Args:
        ax: Its x axis is made logarithmic if the values are positive and span more than
            a factor of 20.
        finite: The values, at least one. If all are equal, the bars cover 0.5 on either
            side.
        num_bins: Number of bars.
    """
    low, high = finite.min(), finite.max()
    if low > 0 and high > _DECADES * low:
        ax.set_xscale("log")
        _name_few_ticks(ax, high / low)
        return np.geomspace(low, high, num_bins + 1)
    width = 0.0 if high > low else 0.5
    return np.linspace(low - width, high + width, num_bins + 1)


def _right_end(ax: Axes, edges: Array) -> float:
    """Return the largest number that is drawn beside a histogram.

    Args:
        ax: Linear, or logarithmic: then everything has room.
        edges: The edges of the bars.
    """
    if ax.get_xscale() == "log":
        return float("inf")
    return float(edges[-1] + 3 * (edges[-1] - edges[0]))


def _name_few_ticks(ax: Axes, span: float) -> None:
    """Label a logarithmic axis so that the labels do not overlap.

    The labels of minor ticks would overlap, so they are removed. Only powers of ten
    would then have a label, and a narrow axis may contain a single one. An axis of less
    than four decades therefore gets two or three labels in each decade.

    Args:
        ax: The axes with a logarithmic x axis.
        span: Ratio of the largest value to the smallest.
    """
    ax.xaxis.set_minor_formatter(NullFormatter())
    if span < _NARROW:
        subs = (1.0, 2.0, 5.0) if span < _NARROW / 10 else (1.0, 3.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
