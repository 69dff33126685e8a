"""Per-example epsilon: the smallest over Rényi orders, found by bisection.

**Idea.** Every order gives an epsilon for each example: its loss at that order plus
the offset of the conversion. As a function of the order this value first falls and then
rises, so its smallest value on a list of 162 orders is found by evaluating about eight
of them for each example instead of all.

**Guarantee.** As for ``privacy_losses``: an estimate, never above the epsilon of the
worst case. Stopping at a neighbour of the best order would only make epsilon larger.

**What breaks it.** A ledger whose noise was assumed: its losses rank examples, and no
epsilon follows from them.
"""

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi.accounting.assumed_noise import require_real_noise
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
from opacus_pi.ledger.grad_norm_ledger import runs_of

Array = NDArray[np.float64]

# The default orders of Opacus's RDP accountant.
DEFAULT_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64))
_BLOCK = 1 << 16  # examples searched at a time


def epsilons(
    ledger: Ledgers,
    delta: float,
    *,
    orders: ArrayLike | None = None,
    tolerance: float = 0.0,
    gaps: str = "smoothed",
) -> Array:
    """Return per-example epsilons at a given delta, the smallest over Rényi orders.

    The losses are those of ``privacy_losses`` with ``convention="corrected"`` and
    ``rule="right"``.

    Args:
        ledger: As in ``privacy_losses``.
        delta: δ in (0, 1).
        orders: Rényi orders to choose from, above 1. Default: those of Opacus.
        tolerance: As in ``privacy_losses``: losses rounded up. A value above 0
            builds one table for each order, which is faster from about 30,000 examples
            on.
        gaps: As in ``privacy_losses``.

    Returns:
        float64 ``(n,)``, at least 0: estimates, as the losses are. Each value is about
        one data set and is itself sensitive.

    Raises:
        ValueError: As for ``privacy_losses``; or if ``delta`` is not in (0, 1), or the
            ledger's noise was assumed, so that it supports nothing but a ranking.

    Source: Canonne, Kamath and Steinke (arXiv:2004.00010), Proposition 12; Sepahvand et
    al. (ICML 2025), Definition 4.2.
    """
    check_delta(delta)
    require_real_noise(runs_of(ledger))
    choices = np.unique(check_orders(DEFAULT_ORDERS if orders is None else orders))
    offsets = epsilon_offset(choices, delta)
    runs = norms_of_runs(ledger, tolerance=tolerance, gaps=gaps)
    mechanism, steps = runs.mechanism, runs.steps
    worst = [worst_case_loss(mechanism, order, steps=steps) for order in choices]
    blocks = [
        _least_epsilons(
            runs.of_examples(slice(i, i + _BLOCK)), choices, offsets, tolerance
        )
        for i in range(0, runs.norms.shape[2], _BLOCK)
    ]
    limit = float((np.array(worst) + offsets).min())
    result: Array = np.clip(np.concatenate([np.empty(0), *blocks]), 0, max(limit, 0.0))
    return result


def _least_epsilons(
    runs: RunNorms, orders: Array, offsets: Array, tolerance: float
) -> Array:
    """Return each example's smallest epsilon over ascending orders, not clipped.

    Bisection on the sign of the difference between neighbouring orders: (order-1) times
    the epsilon is convex in the order, so the epsilon falls and then rises. All
    examples advance together; each evaluates only the orders that it visits.
    """
    examples = np.arange(runs.norms.shape[2])
    known = np.full((len(orders), len(examples)), np.nan)

    def at(places: NDArray[np.int64]) -> Array:
        missing = np.isnan(known[places, examples])
        for k in np.unique(places[missing]):
            columns = examples[missing & (places == k)]
            composition = composition_of(
                runs.mechanism, orders[k], "corrected", None, "exact", tolerance
            )
            losses = total_loss(runs.of_examples(columns), composition, "right")
            known[k, columns] = losses + offsets[k]
        return known[places, examples]

    low = np.zeros(len(examples), dtype=np.int64)
    high = np.full(len(examples), len(orders) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        falls = at(np.minimum(middle + 1, high)) < at(middle)
        low, high = np.where(falls, middle + 1, low), np.where(falls, high, middle)
        low = np.minimum(low, high)
    return at(low)
