"""Per-example epsilon: the least over Rényi orders, found by bisection."""

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi.accounting.conversion import (
    check_delta,
    check_orders,
    epsilon_offset,
)
from opacus_pi.accounting.losses import (
    Ledgers,
    RunNorms,
    composition_of,
    norms_of_runs,
    total_loss,
    worst_case_loss,
)
from opacus_pi.accounting.ranking_only import require_claimable
from opacus_pi.ledger.grad_norm_ledger import runs_of

Array = NDArray[np.float64]

DEFAULT_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64))  # as Opacus
_BLOCK = 1 << 16  # examples searched at a time


def epsilons(
    ledger: Ledgers,
    delta: float,
    *,
    orders: ArrayLike | None = None,
    tolerance: float = 0.0,
) -> Array:
    """Per-example epsilon at a given delta: the least over Rényi orders.

    Uses the corrected convention and the rule "right". As a function of the order, an
    example's epsilon falls and then rises (its numerator is convex), so its least value
    on the list is found by bisection.

    Args:
        ledger: As in ``privacy_losses``.
        delta: In (0, 1).
        orders: Rényi orders to choose from, above 1. Default: Opacus's.
        tolerance: As in ``privacy_losses``: losses rounded up. Every order needs
            tables of its own, which pays with some 30,000 examples or more.

    Returns:
        float64 ``(n,)``, at least 0: estimates, as the losses are. Each value speaks of
        one data set and is itself sensitive.

    Raises:
        ValueError: As ``privacy_losses``; or if ``delta`` is not in (0, 1), or the
            ledger is for ranking only or its noise assumed.
    """
    check_delta(delta)
    require_claimable(runs_of(ledger))
    choices = np.unique(check_orders(DEFAULT_ORDERS if orders is None else orders))
    offsets = epsilon_offset(choices, delta)
    record = norms_of_runs(ledger, tolerance=tolerance)
    mechanism, steps = record.mechanism, record.steps
    worst = [worst_case_loss(mechanism, order, steps=steps) for order in choices]
    blocks = [
        _least_epsilons(record.only(slice(i, i + _BLOCK)), choices, offsets, tolerance)
        for i in range(0, record.norms.shape[2], _BLOCK)
    ]
    limit = float((np.array(worst) + offsets).min())
    result: Array = np.clip(np.concatenate([np.empty(0), *blocks]), 0, max(limit, 0.0))
    return result


def _least_epsilons(
    record: RunNorms, orders: Array, offsets: Array, tolerance: float
) -> Array:
    """Each example's least epsilon over ascending orders, not clipped."""
    everyone = np.arange(record.norms.shape[2])
    known = np.full((len(orders), len(everyone)), np.nan)

    def at(places: NDArray[np.int64]) -> Array:
        missing = np.isnan(known[places, everyone])
        for k in np.unique(places[missing]):
            columns = everyone[missing & (places == k)]
            how = composition_of(
                record.mechanism, orders[k], "corrected", None, "exact", tolerance
            )
            losses = total_loss(record.only(columns), how, "right")
            known[k, columns] = losses + offsets[k]
        return known[places, everyone]

    low = np.zeros(len(everyone), dtype=np.int64)
    high = np.full(len(everyone), len(orders) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        falls = at(np.minimum(middle + 1, high)) < at(middle)
        low, high = np.where(falls, middle + 1, low), np.where(falls, high, middle)
        low = np.minimum(low, high)
    return at(low)
