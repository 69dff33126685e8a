"""Difficulty proxies against privacy losses: Figure 2."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from opacus_pi._types import ArrayLike
from opacus_pi.difficulty.agreement import binned_means, rank_correlations
from opacus_pi.plotting.style import axes_or_new, styles


def plot_proxies(
    losses: ArrayLike,
    proxies: Mapping[str, ArrayLike],
    *,
    num_bins: int = 30,
    ax: Axes | None = None,
) -> Axes:
    """Plot proxies, divided by their maxima, against the privacy loss, in bins.

    All bins hold equally many examples. The band is one standard deviation within the
    bin. The legend gives Spearman's ρ over all examples.

    Args:
        losses: Privacy losses, ``(n,)``.
        proxies: Finite scores of the same examples, ``(n,)`` each, by name.
        num_bins: Number of bins.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: As ``binned_means`` and ``rank_correlations``.

    Source: paper, Figure 2.
    """
    ax = axes_or_new(ax)
    ranks = rank_correlations({**proxies, "": losses})
    for (label, values), style in zip(proxies.items(), styles(), strict=False):
        bins = binned_means(losses, values, num_bins=num_bins)
        low, high = bins.mean - bins.std, bins.mean + bins.std
        ax.fill_between(bins.x, low, high, color=style["color"], alpha=0.12, lw=0)
        text = f"{label} (ρ = {ranks.between(label, '')[0]:.2f})"
        ax.plot(bins.x, bins.mean, label=text, ms=4, lw=1, **style)
    if np.min(losses) > 0:
        ax.set_xscale("log")
    ax.set_xlabel("privacy loss")
    ax.set_ylabel("score / its maximum")
    ax.legend(frameon=False, fontsize="small")
    return ax
