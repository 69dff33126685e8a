"""Group routes of the literature, for comparison with ``group_divergence``.

>>> def loss(order):  # one point: the Gaussian mechanism
...     return order * 0.01 / 2
>>> round(order_multiplied_divergence(loss, 2, 4.0), 4)  # the truth is 4·(2·0.1)²/2
0.0817
>>> round(order_multiplied_divergence(loss, 100, 4.0), 1)  # the truth is 200
227.8
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.accounting.published import weak_triangle


def order_multiplied_divergence(
    worst_loss: Callable[[float], float], group_size: int, order: float
) -> float:
    """Group bound by chaining single removals; the order grows with the group.

    Halving the group, D_α over m points ≤ (α−½)/(α−1)·D_{2α} over ⌈m/2⌉ points +
    D_{2α−1} over ⌊m/2⌋ points (the weak triangle inequality).

    Args:
        worst_loss: Bound on the divergence of removing **any** single point from any of
            the data sets in between, as a function of the order.
        group_size: m ≥ 1.
        order: Rényi order α > 1.

    Returns:
        The bound.

    Raises:
        ValueError: If the group is empty or the order at most 1.

    Source: Mironov 2017, Propositions 2 and 11; the route of Chien et al. 2024,
    Corollary 3.4.
    """
    in_range(1, np.inf, group_size=group_size, remedy="Count the group's points.")
    if group_size == 1:
        return float(worst_loss(order))
    half = (group_size + 1) // 2
    first = order_multiplied_divergence(worst_loss, half, 2 * order)
    second = order_multiplied_divergence(worst_loss, group_size - half, 2 * order - 1)
    return weak_triangle(order, first, second)


def summed_losses(losses: ArrayLike, owners: ArrayLike) -> NDArray[np.float64]:
    """Sum of per-example losses for each owner. A heuristic: **not** a bound.

    Two examples with equal gradients cost four times what one does, not twice.

    Args:
        losses: ``(n,)``, per-example privacy losses.
        owners: int ``(n,)``, whose example each is, 0 … U − 1.

    Returns:
        float64 ``(U,)``.

    Raises:
        ValueError: If the shapes differ.
    """
    values, who = np.asarray(losses, dtype=np.float64), np.asarray(owners)
    expect(
        values.ndim == 1 and values.shape == who.shape and who.dtype.kind in "iu",
        "owners",
        f"{who.dtype} of shape {who.shape}",
        f"to be whole numbers of shape {values.shape}",
        "Name one owner for each loss.",
    )
    in_range(0, np.inf, owners=who, remedy="Number the owners from 0.")
    return np.bincount(who, weights=values).astype(np.float64, copy=False)
