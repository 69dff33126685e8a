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
    warn_of_large_delta,
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
Integers = NDArray[np.int64]
Answer = Callable[[RunNorms], Array]  # one number for each example of a block

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
    with ``convention="corrected"`` and ``rule="right"``. Warns if ``delta`` is not
    below 1/n, for n examples.

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
    runs = _ready(ledger, gaps)
    warn_of_large_delta(delta, runs[0].num_examples)
    if tolerance is None:
        tolerance = default_tolerance(runs)
    choices = DEFAULT_ORDERS if orders is None else orders
    search = partial(_epsilons_in, orders=choices, delta=delta, tolerance=tolerance)
    (result,) = _of_blocks(runs, (search,), tolerance, gaps)
    if composition == "numerical":
        result = np.minimum(result, composed_epsilons(runs, delta, gaps))
    return result


def losses_and_epsilons(
    ledger: Ledgers, order: float, delta: float, *, tolerance: float | None = None
) -> tuple[Array, Array]:
    """Return what ``privacy_losses`` and ``epsilons`` return, in less time than both.

    What the norms in gaps may have been is predicted once for both.

    Args:
        ledger: As in ``privacy_losses``.
        order: Rényi order of the losses, above 1.
        delta: δ of the epsilons, in (0, 1).
        tolerance: Of both, as in ``epsilons``.

    Returns:
        Losses in nats and epsilons, float64 ``(n,)`` each.

    Raises:
        ValueError: As for ``epsilons``.
    """
    check_delta(delta)
    runs = _ready(ledger, "smoothed")
    if tolerance is None:
        tolerance = default_tolerance(runs)
    losses = partial(_losses_in, order=order, tolerance=tolerance)
    search = partial(
        _epsilons_in, orders=DEFAULT_ORDERS, delta=delta, tolerance=tolerance
    )
    found = _of_blocks(runs, (losses, search), tolerance, "smoothed")
    return found[0], found[1]


def _ready(ledger: Ledgers, gaps: str) -> tuple[GradNormLedger, ...]:
    """Return the runs of a ledger whose noise is real, ready to be cut into blocks."""
    runs = runs_of(ledger)
    require_real_noise(runs)
    if gaps == "rank":  # needs the ranks among all examples
        runs = tuple(filled_by_rank(run) for run in runs)
    return runs


def _of_blocks(
    runs: Sequence[GradNormLedger],
    makers: Sequence[Callable[[RunNorms], Answer]],
    tolerance: float,
    gaps: str,
) -> list[Array]:
    """Return several numbers of every example, computed for a block at a time.

    Args:
        runs: The runs.
        makers: Each makes, from the first block, a function that returns one number for
            each example of a block.
        tolerance: As in ``epsilons``.
        gaps: As in ``epsilons``.

    Returns:
        One array ``(n,)`` for each maker.
    """
    of_block = partial(norms_of_runs, runs, tolerance=tolerance, gaps=gaps)
    block = of_block(columns=slice(0, _BLOCK))
    functions = [make(block) for make in makers]
    found = [[answer(block) for answer in functions]]
    for start in range(_BLOCK, runs[0].num_examples, _BLOCK):
        block = of_block(columns=slice(start, start + _BLOCK))
        found.append([answer(block) for answer in functions])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def default_tolerance(runs: Sequence[GradNormLedger]) -> float:
    """Return the tolerance of ``epsilons`` for these runs if none is given.

    Args:
        runs: What ``runs_of`` returns.

    Returns:
        1e-3 for a run with more than 16,384 norms (rows times examples), else 0.
    """
    many = len(runs) == 1 and runs[0].grad_norms.size > _FEW
    return DEFAULT_TOLERANCE if many else 0.0


def _losses_in(first: RunNorms, order: float, tolerance: float) -> Answer:
    """Return a function that gives the losses of a block of examples.

    Args:
        first: A block of the run.
        order: Rényi order, above 1.
        tolerance: Relative error allowed; 0: none.
    """
    composition = composition_of(
        first.mechanism, order, "corrected", None, "exact", tolerance
    )
    worst = worst_case_loss(first.mechanism, order, steps=first.steps)
    return lambda block: np.minimum(total_loss(block, composition, "right"), worst)


def _epsilons_in(
    first: RunNorms, orders: ArrayLike, delta: float, tolerance: float
) -> Answer:
    """Return a function that gives the smallest epsilons of a block of examples.

    Args:
        first: A block of the run.
        orders: Rényi orders to choose from.
        delta: δ.
        tolerance: Relative error allowed; 0: none.
    """
    choices = np.unique(check_orders(orders))
    offsets = epsilon_offset(choices, delta)
    worst = [
        worst_case_loss(first.mechanism, order, steps=first.steps) for order in choices
    ]
    limit = max(float((np.array(worst) + offsets).min()), 0.0)
    search = _search_in(first, choices, offsets, tolerance)
    return lambda block: np.clip(search(block), 0, limit)


def _search_in(
    runs: RunNorms, orders: Array, offsets: Array, tolerance: float
) -> Answer:
    """Return a function that gives each example's smallest value over the orders.

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

    rises = np.diff(added, append=added[-1:])

    def search(block: RunNorms) -> Array:
        losses = tables.of_examples(block)
        places = _least_places(
            lambda places: losses.rises(places) + rises[places] < 0,
            block.norms.shape[2],
            len(added),
        )
        return losses.at(places) + added[places]

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

    def at(places: Integers) -> Array:
        missing = np.isnan(known[places, examples])
        for k in np.unique(places[missing]):
            columns = examples[missing & (places == k)]
            composition = composition_of(
                runs.mechanism, orders[k], "corrected", None, "exact", tolerance
            )
            losses = total_loss(runs.of_examples(columns), composition, "right")
            known[k, columns] = losses + offsets[k]
        return known[places, examples]

    def falls(places: Integers) -> NDArray[np.bool_]:
        return at(np.minimum(places + 1, len(orders) - 1)) < at(places)

    return at(_least_places(falls, len(examples), len(orders)))


def _least_places(
    falls: Callable[[Integers], NDArray[np.bool_]], num_examples: int, num_orders: int
) -> Integers:
    """Return where, among ascending orders, each example's value is smallest.

    Bisection on the sign of the difference between neighbouring orders: (order-1) times
    the epsilon is convex in the order, so the epsilon falls and then rises. All
    examples advance together; each evaluates only the orders that it visits.

    Args:
        falls: From an order of its own for each example, by position, ``(n,)``, to
            whether its value at the next order is smaller; at the last order anything.
        num_examples: n.
        num_orders: Number of orders.
    """
    low = np.zeros(num_examples, dtype=np.int64)
    high = np.full(num_examples, num_orders - 1)
    while (low < high).any():
        middle = (low + high) // 2
        is_later = falls(middle)
        low = np.where(is_later, middle + 1, low)
        high = np.where(is_later, high, middle)
        low = np.minimum(low, high)
    return low
