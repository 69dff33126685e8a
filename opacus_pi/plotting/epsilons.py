"""Per-example ε of a run, from the smallest to the largest, below the worst case."""

import numpy as np
from matplotlib.axes import Axes

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.plotting.style import COLOURS, GREY, axes_or_new


def plot_epsilons(
    epsilons: ArrayLike,
    worst_case: float,
    limits: ArrayLike | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot the ε of all examples in increasing order, below the line of the worst case.

    Args:
        epsilons: Estimates of ε, one per example, ``(n,)``, all finite.
        worst_case: A bound on ε for any example; ``inf`` draws no line.
        limits: Upper limits of the same examples, ``(n,)``, drawn as dots. Default:
            none are drawn.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If there is no example, a value is not finite, or there is not one
            limit per example.
    """
    values = np.asarray(epsilons, dtype=np.float64).ravel()
    expect(
        values.size > 0 and bool(np.isfinite(values).all()),
        "epsilons",
        f"{values.size} numbers, {int(np.isfinite(values).sum())} of them finite",
        "must be finite numbers, at least one",
        "Leave out the examples without an estimate.",
    )
    ax = axes_or_new(ax)
    order = np.argsort(values, kind="stable")
    share = (np.arange(values.size) + 0.5) / values.size * 100
    if limits is not None:
        above = np.asarray(limits, dtype=np.float64).ravel()
        expect(
            above.size == values.size,
            "limits",
            f"{above.size} numbers for {values.size} examples",
            "must have one number per example",
            "Compute both from the same ledger.",
        )
        ax.plot(
            share,
            above[order],
            ".",
            ms=2,
            color=COLOURS[5],
            label="upper limit, 95 % confidence",
            rasterized=True,
        )
    if np.isfinite(worst_case):
        ax.axhline(worst_case, color=GREY, lw=1.5, ls=(0, (4, 3)), label="worst case")
    ax.plot(share, values[order], color=COLOURS[0], lw=2.2, label="estimate")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, None)
    ax.set_xlabel("examples, in % (sorted by ε)")
    ax.set_ylabel("ε of the example")
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax
