"""Per-example epsilon: the smallest over Rényi orders, found by bisection.

**Idea.** Every order gives an epsilon for each example: its loss at that order plus
the offset of the conversion. As a function of the order this value first falls and then
rises, so its smallest value on a list of 162 orders is found by evaluating about eight
of them for each example instead of all.

**Guarantee.** As for ``privacy_losses``: an estimate, never above the epsilon of the
worst case. By default it is rounded up. Stopping at a neighbour of the best order would
only make epsilon larger.

``composition="numerical"`` composes the updates without Rényi orders
(``composed_epsilon``), which gives a smaller epsilon.

**What breaks it.** A ledger whose noise was assumed: its losses rank examples, and no
epsilon follows from them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.accounting.assumed_noise import require_real_noise
from opacus_pi.accounting.composed_epsilon import composed_epsilons
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
from opacus_pi.accounting.tabled_losses import TabledLosses, can_be_tabled
from opacus_pi.ledger.grad_norm_ledger import (
    GradNormLedger,
    filled_by_rank,
    runs_of,
)

Array = NDArray[np.float64]

# The default orders of Opacus's RDP accountant.
DEFAULT_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64))
COMPOSITIONS = ("renyi", "numerical")
DEFAULT_TOLERANCE = 1e-3  # for more than a few examples
_FEW = 1 << 14  # norms, whose exact losses take less time than tables
_BLOCK = 1 << 16  # examples searched at a time


def epsilons(
    ledger: Ledgers,
    delta: float,
    *,
    orders: ArrayLike | None = None,
    tolerance: float | None = None,
    gaps: str = "smoothed",
    composition: str = "renyi",
) -> Array:
    """Return per-example epsilons at a given delta.

    By default the smallest over Rényi orders, from the losses of ``privacy_losses``
    with ``convention="corrected"`` and ``rule="right"``.

    Args:
        ledger: As in ``privacy_losses``.
        delta: δ in (0, 1).
        orders: Rényi orders to choose from, above 1. Default: those of Opacus.
        tolerance: 0: exact. Above 0, from 1e-8 to 1 and for one run: rounded up, by at
            most this relative amount, never down. From 1e-4 on, one set of tables
            serves all orders. Where norms were not observed, the mean over what they
            may have been is then rounded up by at most 30 times as much; in
            measurements by less than the tolerance. Default: 1e-3 for a run with
            more than 16,384 norms (rows times examples), else 0.
        gaps: As in ``privacy_losses``.
        composition: ``"renyi"``, or ``"numerical"``, for one run: the recorded norms
            are composed by numerical integration, for both directions. ε is rounded
            up, usually by less than 1 %, and never above that of ``"renyi"``.
            In ``benchmarks.composed_epsilons`` it was 17 to 47 % smaller for half of
            the examples, and took 1 to 5 seconds more for 10,000 of them.

    Returns:
        float64 ``(n,)``, at least 0: estimates, as the losses are. Each value is about
        one data set and is itself sensitive.

    Raises:
        ValueError: As for ``privacy_losses``; or if ``delta`` is not in (0, 1), or the
            ledger's noise was assumed, so that it supports nothing but a ranking; or
            if ``composition`` is unknown, or numerical for several runs.

    Source: Canonne, Kamath and Steinke (arXiv:2004.00010), Proposition 12; Sepahvand et
    al. (ICML 2025), Definition 4.2.
    """
    check_delta(delta)
    expect(
        composition in COMPOSITIONS,
        "composition",
        repr(composition),
        f"must be in {COMPOSITIONS}",
        'The default is "renyi".',
    )
    require_real_noise(runs_of(ledger))
    choices = np.unique(check_orders(DEFAULT_ORDERS if orders is None else orders))
    offsets = epsilon_offset(choices, delta)
    runs = runs_of(ledger)
    if tolerance is None:
        tolerance = default_tolerance(runs)
    if gaps == "rank":  # needs the ranks among all examples
        runs = tuple(filled_by_rank(run) for run in runs)
    of_block = partial(norms_of_runs, runs, tolerance=tolerance, gaps=gaps)
    first = of_block(columns=slice(0, _BLOCK))
    search = _search_in(first, choices, offsets, tolerance)
    blocks = [search(first)] + [
        search(of_block(columns=slice(i, i + _BLOCK)))
        for i in range(_BLOCK, runs[0].num_examples, _BLOCK)
    ]
    mechanism, steps = first.mechanism, first.steps
    worst = [worst_case_loss(mechanism, order, steps=steps) for order in choices]
    limit = float((np.array(worst) + offsets).min())
    result: Array = np.clip(np.concatenate(blocks), 0, max(limit, 0.0))
    if composition == "numerical":
        result = np.minimum(result, composed_epsilons(runs, delta, gaps))
    return result


def default_tolerance(runs: Sequence[GradNormLedger]) -> float:
    """Return the tolerance of ``epsilons`` for these runs if none is given.

    Args:
        runs: What ``runs_of`` returns.

    Returns:
        1e-3 for a run with more than 16,384 norms (rows times examples), else 0.
    """
    many = len(runs) == 1 and runs[0].grad_norms.size > _FEW
    return DEFAULT_TOLERANCE if many else 0.0


def _search_in(
    runs: RunNorms, orders: Array, offsets: Array, tolerance: float
) -> Callable[[RunNorms], Array]:
    """Return a function that gives the smallest epsilons of a block of examples.

    Args:
        runs: A block of the run.
        orders: Rényi orders, ascending.
        offsets: What each adds to a loss to make it an epsilon.
        tolerance: Relative error allowed; 0: none.
    """
    if not can_be_tabled(runs, tolerance):
        return partial(
            _searched_one_order_at_a_time,
            orders=orders,
            offsets=offsets,
            tolerance=tolerance,
        )
    tables = TabledLosses(runs, orders, offsets, tolerance)
    added = offsets[tables.places]

    def search(block: RunNorms) -> Array:
        losses = tables.of_examples(block)
        return _least_values(
            lambda places: losses(places) + added[places],
            block.norms.shape[2],
            len(added),
        )

    return search


def _searched_one_order_at_a_time(
    runs: RunNorms, orders: Array, offsets: Array, tolerance: float
) -> Array:
    """Return each example's smallest epsilon, from the loss at each order it visits.

    Args:
        runs: A block of examples.
        orders: Rényi orders, ascending.
        offsets: What each adds to a loss to make it an epsilon.
        tolerance: As in ``privacy_losses``.
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

    return _least_values(at, len(examples), len(orders))


def _least_values(
    at: Callable[[NDArray[np.int64]], Array], num_examples: int, num_orders: int
) -> Array:
    """Return each example's smallest value over ascending orders.

    Bisection on the sign of the difference between neighbouring orders: (order-1) times
    the epsilon is convex in the order, so the epsilon falls and then rises. All
    examples advance together; each evaluates only the orders that it visits.

    Args:
        at: The value of each example at an order of its own, by position, ``(n,)``.
        num_examples: n.
        num_orders: Number of orders.
    """
    low = np.zeros(num_examples, dtype=np.int64)
    high = np.full(num_examples, num_orders - 1)
    while (low < high).any():
        middle = (low + high) // 2
        falls = at(np.minimum(middle + 1, high)) < at(middle)
        low, high = np.where(falls, middle + 1, low), np.where(falls, high, middle)
        low = np.minimum(low, high)
    return at(low)
