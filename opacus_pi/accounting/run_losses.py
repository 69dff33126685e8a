"""Loss of a recorded run, interval by interval: where ledgers meet compositions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect, in_range
from opacus_pi.accounting.composition import (
    PUBLISHED,
    published_orders,
    weighted_log_moments,
)
from opacus_pi.accounting.moments import MODES
from opacus_pi.accounting.orders import corrected_order, interval_orders
from opacus_pi.accounting.rules import (
    RULES,
    STRATIFIED,
    Interval,
    intervals,
    loss_under_rule,
    strata,
)
from opacus_pi.accounting.tables import check_tolerance, upper_log_moments
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of
from opacus_pi.ledger.measurements import fill_unobserved
from opacus_pi.ledger.mechanism import NoisySGD

Array = NDArray[np.float64]
Ledgers = GradNormLedger | Sequence[GradNormLedger]
CONVENTIONS = ("corrected", *PUBLISHED)
ROW_RULES = (*RULES, STRATIFIED)
_HIGHEST_ORDER = 1e6


@dataclass(frozen=True)
class Composition:
    """How single updates are composed; the arguments of ``privacy_losses``."""

    order: float
    convention: str
    hoelder_p: float
    mode: str
    tolerance: float = 0.0


@dataclass(frozen=True, eq=False)
class Record:
    """Several runs' facts, steps and filled norms ``(R, N, n)``."""

    mechanism: NoisySGD
    steps: NDArray[np.int64]
    norms: Array

    def only(self, columns: NDArray[Any] | slice) -> "Record":
        """The same runs, seen by some of the examples."""
        return replace(self, norms=self.norms[..., columns])


def total_loss(record: Record, how: Composition, rule: str) -> Array:
    """Sum over the intervals of a run."""
    loss = partial(loss_of_interval, record, how)
    total = np.zeros(record.norms.shape[2])
    if rule == STRATIFIED:
        for size, drawn in strata(record.steps, record.mechanism.num_steps):
            total += size * loss(drawn, drawn.left)
        return total
    for interval in intervals(record.steps, record.mechanism.num_steps):
        total += loss_under_rule(loss, interval, rule)
    return total


def loss_of_interval(
    record: Record, how: Composition, interval: Interval, row: int
) -> Array:
    """One interval's loss if one row's norms held throughout.

    The mechanism's values are the interval's own, whichever row gives the norms.
    """
    mechanism = record.mechanism.at_row(interval.right)
    ratios = mechanism.ratios(record.norms[:, row])
    orders, weights = _orders(record, how, interval, row)
    # Amplification by sampling belongs to Poisson sampling. Any other schedule is
    # conditioned on: a share q of the updates contains the example, for certain.
    q = float(mechanism.sample_rate)
    if how.convention == "corrected" and mechanism.sampling != "poisson":
        q, weights = 1.0, weights * q
    if how.tolerance:
        return upper_log_moments(ratios[0], q, orders, weights, how.tolerance)
    return weighted_log_moments(
        ratios, q, orders, weights, hoelder_p=how.hoelder_p, mode=how.mode
    )


def _orders(
    record: Record, how: Composition, interval: Interval, row: int
) -> tuple[Array, Array]:
    """The orders at which an interval's log moments are summed, and their weights."""
    mechanism = record.mechanism.at_row(interval.right)
    if how.convention in PUBLISHED:
        first = 0 if how.convention == "thudi2024_code" else 1
        orders, weights = published_orders(
            how.order,
            max(int(record.steps[row]), first),
            hoelder_p=how.hoelder_p,
            convention=how.convention,
        )
        return orders, weights * interval.num_updates
    num_steps = mechanism.num_steps
    return interval_orders(
        how.order,
        how.hoelder_p,
        (num_steps - interval.last, num_steps - interval.first),
        sample_rate=float(mechanism.sample_rate)
        if mechanism.sampling == "poisson"
        else 1.0,
        mode=how.mode,
        single_run=len(record.norms) == 1,
    )


def record_of(ledger: Ledgers, rule: str = "right", tolerance: float = 0.0) -> Record:
    """The checked runs as arrays, if rule and tolerance can be applied to them."""
    runs = runs_of(ledger)
    first = runs[0]
    check_tolerance(tolerance, num_runs=len(runs))
    expect(rule in ROW_RULES, "rule", repr(rule), f"in {ROW_RULES}", "Default: right.")
    for run in runs:
        expect(
            rule != STRATIFIED or run.source == "swept",
            "rule",
            repr(rule),
            "only with swept rows",
            "An observed row is of whatever update an example last took part in: "
            "record with Recorder.stratified.",
        )
    expect(
        first.num_rows > 0 or first.mechanism.num_steps == 0,
        "ledger",
        "0 rows",
        "to have a row",
        "Record at least once during training.",
    )
    first.mechanism.ratios(np.empty((first.num_rows, 0)))  # refuses noise_std = 0
    filled = [fill_unobserved(run.grad_norms) for run in runs]
    norms = filled[0][None] if len(filled) == 1 else np.stack(filled)
    return Record(first.mechanism, first.steps, norms)


def composition_of(
    mechanism: NoisySGD,
    order: float,
    convention: str,
    hoelder_p: float | None,
    mode: str,
    tolerance: float = 0.0,
) -> Composition:
    """The checked arguments."""
    in_range(1, math.inf, closed=False, order=order, remedy="Try 8.")
    expect(
        convention in CONVENTIONS,
        "convention",
        repr(convention),
        f"in {CONVENTIONS}",
        "The default is corrected.",
    )
    expect(mode in MODES, "mode", repr(mode), f"in {MODES}", "The default is exact.")
    remedy = (
        "Fix it beforehand (default: 3·num_steps): a p chosen on the runs that are "
        "averaged degenerates to the plain sum."
    )
    p = max(3.0 * mechanism.num_steps, 3.0) if hoelder_p is None else hoelder_p
    numeric = isinstance(p, (int, float, np.number))
    expect(numeric and p > 1, "hoelder_p", p, "to be a number above 1", remedy)
    expect(
        math.isfinite(p) or convention == "corrected",
        "hoelder_p",
        p,
        f"to be finite under {convention}",
        "The published coefficient grows with p.",
    )
    highest = float(corrected_order(order, p, mechanism.num_steps))
    expect(
        highest <= _HIGHEST_ORDER,
        "hoelder_p",
        p,
        f"to keep orders below {_HIGHEST_ORDER:g}: {mechanism.num_steps} updates raise "
        f"{order} to {highest:.3g}",
        "Take one of about num_steps, or larger.",
    )
    return Composition(float(order), convention, float(p), mode, float(tolerance))
