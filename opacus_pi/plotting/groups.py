"""Divergences of whole groups: Figure 4."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.plotting.style import axes_or_new, losses_below, runs_and_sets, styles


def plot_group_divergences(
    mean_losses: ArrayLike,
    divergences: Mapping[str, ArrayLike],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot group divergences of forget sets against their mean privacy loss.

    Points are means over estimates, and bars are one standard deviation of the
    estimates. The axis is logarithmic, because the methods differ by orders of
    magnitude. It is linear around 0 if a mean is not positive, which happens for
    Theorem B.1.

    Args:
        mean_losses: Mean privacy loss of each forget set, ``(sets,)``.
        divergences: Estimates of each method, ``(estimates, sets)``; a single estimate
            may have shape ``(sets,)``.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        ValueError: If there is not one divergence per set.

    Source: paper, Figure 4 and Appendix B.1.
    """
    ax = axes_or_new(ax)
    losses = np.asarray(mean_losses, dtype=np.float64)
    lowest = np.inf
    for (label, values), style in zip(divergences.items(), styles(), strict=False):
        estimates = runs_and_sets(f"divergences[{label!r}]", values)
        expect(
            losses.shape == estimates.shape[1:],
            "mean_losses",
            f"an array of shape {losses.shape}",
            f"must have one loss for each of {estimates.shape[1]} sets",
            "Pass one mean loss per forget set.",
        )
        mean = estimates.mean(0)
        lowest = min(lowest, mean.min())
        ax.errorbar(losses, mean, estimates.std(0), label=label, capsize=3, **style)
    losses_below(ax)
    ax.set_yscale("log" if lowest > 0 else "symlog")
    ax.set_ylabel("divergence of the group")
    ax.legend(frameon=False)
    return ax
