"""Per-example Rényi privacy losses of a recorded training run.

A ledger holds gradient norms at a few rows. ``privacy_losses`` cuts the run into
intervals around the rows (``rules``), composes the moments of each interval's updates
(``composition``) and adds the intervals up.

>>> from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
>>> from opacus_pi.ledger.mechanism import NoisySGD
>>> mechanism = NoisySGD(
...     num_steps=100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0
... )
>>> ledger = GradNormLedger(mechanism, steps=[50, 100], grad_norms=[[0.1, 5], [0.1, 5]])
>>> privacy_losses(ledger, order=8).round(4)
array([0.0117, 1.3725])

A value from one run uses that run's norms where the theorem has an expectation over
runs, and a few rows where it has every update: it is an estimate. The bound that holds
for every run is ``worst_case_loss``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, one_number, require
from opacus_pi.accounting.composition import (
    PUBLISHED,
    corrected_order,
    default_hoelder_p,
    interval_orders,
    published_orders,
    weighted_log_moments,
)
from opacus_pi.accounting.moments import MODES
from opacus_pi.accounting.predicted_losses import PredictedNorms, mean_over_gaps
from opacus_pi.accounting.rules import (
    RULES,
    SMOOTHED,
    STRATIFIED,
    UpdateInterval,
    intervals,
    loss_under_rule,
    require_steps,
    strata,
    worst_case_of_fixed,
)
from opacus_pi.accounting.tables import check_tolerance, upper_log_moments
from opacus_pi.ledger.gap_filling import fill_unobserved
from opacus_pi.ledger.grad_norm_ledger import (
    GradNormLedger,
    filled_by_rank,
    joint_mechanism,
    runs_of,
)
from opacus_pi.ledger.mechanism import NoisySGD

Array = NDArray[np.float64]
Ledgers = GradNormLedger | Sequence[GradNormLedger]
CONVENTIONS = ("corrected", *PUBLISHED)
ROW_RULES = (*RULES, STRATIFIED, SMOOTHED)
GAPS = ("smoothed", "rank", "next")
_HIGHEST_ORDER = 1e6  # only a p far too small for the run raises orders to this
# The number of the first update: the released code of Thudi et al. counts from 0.
_FIRST_UPDATE = {"corrected": 1, "icml2025": 1, "thudi2024_code": 0}


def privacy_losses(
    ledger: Ledgers,
    order: float,
    *,
    convention: str = "corrected",
    rule: str = "right",
    hoelder_p: float | None = None,
    mode: str = "exact",
    tolerance: float = 0.0,
    gaps: str = "smoothed",
) -> Array:
    """Return the Rényi privacy loss of every example over a whole training run.

    Args:
        ledger: One run, or several independent runs of the same training procedure,
            over which the expectations are taken.
        order: Rényi order, above 1.
        convention: ``"corrected"``: the theorem as its proof gives it, and never above
            the worst case where gradients were clipped. ``"icml2025"`` and
            ``"thudi2024_code"``: as published, for reproduction; their orders are
            rounded up whatever ``mode`` says, and each row's value is multiplied by
            the number of updates it is used for.
        rule: Which row is used for which updates: ``"right"`` (the paper's),
            ``"left"``, ``"trapezoid"`` or ``"max"``; ``"stratified"`` for rows of
            ``Recorder.stratified``: for each example unbiased for one run's sum over
            all its updates; ``"smoothed"`` for a swept ledger: for most updates of a
            row the mean loss over the norms that are plausible given all rows. It
            compares the ranks of the ledger's examples, so pass the whole ledger.
        hoelder_p: The p of Hölder's inequality, above 1, chosen before looking at the
            runs. Default: 3·num_steps, the paper's; ``inf``: the plain sum over the
            updates.
        mode: How moments are taken at real orders, as in ``log_moment``.
        tolerance: 0: no rounding. From 1e-8 to 1, for one run: moments are read from
            tables. This makes the losses larger by at most this relative amount, never
            smaller, and is many times faster for tens of thousands of examples.
        gaps: How an observed ledger fills updates that did not draw an example.
            ``"smoothed"``: with the mean loss over the norms that are plausible given
            all its draws (``ledger.smoothed_ranks``); ``"rank"``: with the norm that
            has the rank of its next draw; ``"next"``: with the norm of its next draw,
            which gives losses up to 100,000 times too small where norms shrink.

    Returns:
        float64 ``(n,)``, in nats: an estimate of a bound on the Rényi divergence of
        training with the example from training without it. One run stands in for the
        expectations, and a few rows for all updates. ``worst_case_loss`` is a bound.

    Raises:
        ValueError: If an argument is outside its domain, the runs do not belong
            together, or the mechanism has no noise.

    Source: Sepahvand et al. (ICML 2025), Definition 4.2 and Section 5.1, after Thudi
    et al. (arXiv:2307.00310), Theorem 3.3.
    """
    runs = norms_of_runs(ledger, rule, tolerance, gaps)
    composition = composition_of(
        runs.mechanism, order, convention, hoelder_p, mode, tolerance
    )
    losses = total_loss(runs, composition, "right" if rule == SMOOTHED else rule)
    if convention != "corrected":
        return losses
    worst = worst_case_loss(runs.mechanism, order, steps=runs.steps)
    return np.minimum(losses, worst)


def per_step_losses(
    ledger: Ledgers,
    order: float,
    *,
    convention: str = "corrected",
    hoelder_p: float | None = None,
    mode: str = "exact",
    gaps: str = "smoothed",
) -> Array:
    """Return the contribution of a single update at each row of the ledger.

    Row i is the contribution of update ``steps[i]`` with that row's norms. A row at 0
    gives the contribution of the first update (``"thudi2024_code"`` counts updates from
    0, so there it gives that of update 0).

    Args:
        ledger: As in ``privacy_losses``.
        order: Rényi order, above 1.
        convention: As in ``privacy_losses``.
        hoelder_p: As in ``privacy_losses``.
        mode: As in ``log_moment``.
        gaps: As in ``privacy_losses``.

    Returns:
        float64 ``(N, n)``, in nats: estimates, as from ``privacy_losses``.

    Raises:
        ValueError: As for ``privacy_losses``.

    Source: Sepahvand et al. (ICML 2025), Definition 4.2.
    """
    runs = norms_of_runs(ledger, gaps=gaps)
    composition = composition_of(runs.mechanism, order, convention, hoelder_p, mode)
    first = _FIRST_UPDATE[convention]
    losses = np.empty(runs.norms.shape[1:])
    for row, step in enumerate(runs.steps):
        update = max(int(step), first)
        losses[row] = loss_of_interval(
            runs, composition, UpdateInterval(update, update, row, row), row
        )
    return losses


def worst_case_loss(
    mechanism: NoisySGD, order: float, *, steps: ArrayLike | None = None
) -> float:
    """Return the worst case: the loss of an example whose norm is C at every update.

    This is the Rényi differential privacy of the mechanism, a bound for any example.
    Under fixed sampling ``mechanism.max_participations`` is the largest number of
    updates that any example was in; the bound takes the most expensive updates of the
    run, as many as that. Without it, an example is in one update of every epoch: the
    bound takes the most expensive one, and an incomplete epoch counts in full.

    Args:
        mechanism: Noise, clip norm and sampling of the run.
        order: Rényi order, above 1.
        steps: The ledger's steps ``(N,)``; needed if noise, sample rate or clip norm
            follow a schedule, whose values hold up to each row.

    Returns:
        The divergence, in nats; ``inf`` without clipping.

    Raises:
        ValueError: If an argument is outside its domain or the steps are missing.

    Source: Mironov, Talwar and Zhang (arXiv:1908.10530), Section 3.
    """
    expect(
        isinstance(mechanism, NoisySGD),
        "mechanism",
        f"a {type(mechanism).__name__}",
        "must be a NoisySGD",
        "Pass the ledger's: worst_case_loss(ledger.mechanism, order, "
        "steps=ledger.steps).",
    )
    composition = composition_of(mechanism, order, "corrected", math.inf, "exact")
    is_changed = require_steps(mechanism, steps)
    rows = np.asarray(steps) if is_changed else np.array([mechanism.num_steps])
    if mechanism.sampling != "poisson":
        parts = intervals(rows, mechanism.num_steps)
        facts = [mechanism.at_row(part.right) for part in parts]
        divergences = [order * float(f.ratios(math.inf)) ** 2 / 2 for f in facts]
        return worst_case_of_fixed(parts, facts, divergences)
    unbounded = np.full((1, len(rows), 1), math.inf)
    return float(
        total_loss(RunNorms(mechanism, rows, unbounded), composition, "right")[0]
    )


@dataclass(frozen=True)
class Composition:
    """The way in which the moments of single updates are composed into a loss.

    Args:
        order: Rényi order of the result, above 1.
        convention: One of ``CONVENTIONS``.
        hoelder_p: p of Hölder's inequality, above 1; ``inf`` allowed.
        mode: How moments are taken at real orders, as in ``log_moment``.
        tolerance: Relative error allowed to tables; 0: no tables.
    """

    order: float
    convention: str
    hoelder_p: float
    mode: str
    tolerance: float = 0.0


@dataclass(frozen=True, eq=False)
class RunNorms:
    """Gradient norms of one or several runs, ready for composition.

    Args:
        mechanism: The mechanism that the runs share.
        steps: int64 ``(N,)``, updates done at each row.
        norms: float64 ``(R, N, n)`` for R runs, raw norms; NaN only where predictions
            say what they may have been.
        participations: float64 ``(N, n)``, in how many updates of each row's interval
            an example was, in the mean over the runs; None: not counted.
        predictions: For each run, what the norms in its gaps may have been; None for a
            run without gaps. Empty: no run has gaps.
    """

    mechanism: NoisySGD
    steps: NDArray[np.int64]
    norms: Array
    participations: Array | None = None
    predictions: tuple[PredictedNorms | None, ...] = ()

    def of_examples(self, columns: NDArray[Any] | slice) -> "RunNorms":
        """Return the same runs restricted to some examples (columns)."""
        counts = self.participations
        chosen = None if counts is None else counts[..., columns]
        predictions = tuple(p and p.of_examples(columns) for p in self.predictions)
        return RunNorms(
            self.mechanism,
            self.steps,
            self.norms[..., columns],
            chosen,
            predictions,
        )

    def share_of_updates(self, interval: UpdateInterval) -> Array | float:
        """Return which share of an interval's updates each example was in.

        For fixed sampling. Several intervals may belong to one row (those after the
        last one); the example's updates are taken to be spread evenly over them.

        Args:
            interval: The updates.

        Returns:
            float64 ``(n,)`` as counted, or the sample rate if nothing was counted.
        """
        if self.participations is None:
            return float(self.mechanism.at_row(interval.right).sample_rate)
        parts = intervals(self.steps, self.mechanism.num_steps)
        together = [p.num_updates for p in parts if p.right == interval.right]
        counts: Array = self.participations[interval.right]
        return counts / sum(together)


def total_loss(runs: RunNorms, composition: Composition, rule: str) -> Array:
    """Return the loss of whole runs: the sum over the intervals, float64 ``(n,)``.

    Args:
        runs: The runs' norms.
        composition: How the updates are composed.
        rule: One of ``ROW_RULES``, but not "smoothed": predictions of the norms are
            used with "right".

    Returns:
        float64 ``(n,)``, in nats.

    Raises:
        ValueError: If the rule is "stratified" and the rows are not.
    """
    loss = partial(loss_of_interval, runs, composition)
    total = np.zeros(runs.norms.shape[2])
    if rule == STRATIFIED:
        for size, drawn in strata(runs.steps, runs.mechanism.num_steps):
            total += size * loss(drawn, drawn.left)
        return total
    for interval in intervals(runs.steps, runs.mechanism.num_steps):
        total += loss_under_rule(loss, interval, rule)
    return total


def loss_of_interval(
    runs: RunNorms, composition: Composition, interval: UpdateInterval, row: int
) -> Array:
    """Return one interval's loss if one row's norms held throughout, float64 ``(n,)``.

    Noise, sample rate and clip norm are those of the interval, whichever row gives the
    norms.

    Args:
        runs: The runs' norms.
        composition: How the updates are composed.
        interval: The updates.
        row: Position of the row whose norms are used.

    Returns:
        float64 ``(n,)``, in nats.
    """
    mechanism = runs.mechanism.at_row(interval.right)
    orders, weights = _orders(runs, composition, interval, row)
    # Amplification by sampling requires Poisson sampling. For any other schedule the
    # loss is conditioned on the schedule: the example is in a share of the updates,
    # and there with probability 1.
    q, share = float(mechanism.sample_rate), np.float64(1.0)
    if composition.convention == "corrected" and mechanism.sampling != "poisson":
        q, share = 1.0, np.asarray(runs.share_of_updates(interval))

    def loss_at(norms: Array) -> Array:
        ratios = mechanism.ratios(norms)
        if composition.tolerance:
            return upper_log_moments(
                ratios[0], q, orders, weights, composition.tolerance
            )
        return weighted_log_moments(
            ratios,
            q,
            orders,
            weights,
            hoelder_p=composition.hoelder_p,
            mode=composition.mode,
        )

    whole = mean_over_gaps(runs.norms[:, row], runs.predictions, row, loss_at)
    with np.errstate(invalid="ignore"):  # an infinite loss of an update it was not in
        return np.where(share > 0, share * whole, 0.0)


def _orders(
    runs: RunNorms, composition: Composition, interval: UpdateInterval, row: int
) -> tuple[Array, Array]:
    """Return the orders at which an interval is evaluated, and their weights."""
    mechanism = runs.mechanism.at_row(interval.right)
    if composition.convention in PUBLISHED:
        first = _FIRST_UPDATE[composition.convention]
        orders, weights = published_orders(
            composition.order,
            max(int(runs.steps[row]), first),
            hoelder_p=composition.hoelder_p,
            convention=composition.convention,
        )
        return orders, weights * interval.num_updates
    num_steps = mechanism.num_steps
    return interval_orders(
        composition.order,
        composition.hoelder_p,
        (num_steps - interval.last, num_steps - interval.first),
        sample_rate=float(mechanism.sample_rate)
        if mechanism.sampling == "poisson"
        else 1.0,
        mode=composition.mode,
        single_run=len(runs.norms) == 1,
    )


def norms_of_runs(
    ledger: Ledgers,
    rule: str = "right",
    tolerance: float = 0.0,
    gaps: str = "smoothed",
    columns: slice = slice(None),
) -> RunNorms:
    """Check that the options fit the runs; return the norms and what fills their gaps.

    Args:
        ledger: One run, or several independent runs of the same training procedure.
        rule: One of ``ROW_RULES``.
        tolerance: As in ``privacy_losses``.
        gaps: As in ``privacy_losses``.
        columns: The examples whose norms are returned.

    Returns:
        The norms of all runs.

    Raises:
        ValueError: If there is no row, no noise, or the runs do not belong together;
            or if rule or tolerance cannot be used with them.
    """
    runs = runs_of(ledger)
    first = runs[0]
    check_tolerance(tolerance, num_runs=len(runs))
    _check_row_rule(rule, runs)
    expect(
        first.num_rows > 0 or first.mechanism.num_steps == 0,
        "ledger",
        "0 rows",
        "must have a row",
        "Record at least once during training.",
    )
    first.mechanism.ratios(np.empty((first.num_rows, 0)))  # refuses noise_std = 0
    expect(
        gaps in GAPS,
        "gaps",
        repr(gaps),
        f"must be in {GAPS}",
        'The default is "smoothed".',
    )
    predictions = _predictions(runs, columns, rule, gaps)
    filled = [_norms_of(run, gaps, bool(predictions), columns) for run in runs]
    norms = filled[0][None] if len(filled) == 1 else np.stack(filled)
    counts = [
        run.participations[:, columns] for run in runs if run.participations is not None
    ]
    mean = np.mean(counts, axis=0) if len(counts) == len(runs) else None
    return RunNorms(joint_mechanism(runs), first.steps, norms, mean, predictions)


def _check_row_rule(rule: str, runs: Sequence[GradNormLedger]) -> None:
    """Refuse a rule that is unknown, or that cannot be used with the rows of a run."""
    expect(
        rule in ROW_RULES,
        "rule",
        repr(rule),
        f"must be in {ROW_RULES}",
        'Try "right", the default.',
    )
    for run in runs:
        require(
            rule != STRATIFIED or run.source == "swept",
            "rule='stratified' cannot be used for an observed ledger.",
            "The norms of an observed row come from different updates, one for each "
            "example. Record with Recorder.stratified, which sweeps.",
        )
        require(
            rule != SMOOTHED or run.source == "swept",
            "rule='smoothed' cannot be used for an observed ledger.",
            "Leave rule out: gaps='smoothed', the default, does the same for it.",
        )


def _predictions(
    runs: Sequence[GradNormLedger], columns: slice, rule: str, gaps: str
) -> tuple[PredictedNorms | None, ...]:
    """Return predictions of norms that were not measured; empty if not asked for any.

    Args:
        runs: The runs.
        columns: The examples to predict.
        rule: "smoothed" asks for the norms between the rows of swept runs.
        gaps: "smoothed" asks for the norms in the gaps of observed runs.
    """
    if rule == SMOOTHED and runs[0].num_rows:
        return tuple(PredictedNorms.between_rows(run, columns) for run in runs)
    if gaps != "smoothed":
        return ()
    predictions = tuple(PredictedNorms.of(run, columns) for run in runs)
    return predictions if any(p is not None for p in predictions) else ()


def _norms_of(
    run: GradNormLedger, gaps: str, keeps_gaps: bool, columns: slice
) -> Array:
    """Return the norms of a run, float64 ``(N, n)``, with or without its gaps."""
    if keeps_gaps:
        return run.grad_norms[:, columns].astype(np.float64)
    if gaps == "rank":
        run = filled_by_rank(run)
    return fill_unobserved(run.grad_norms[:, columns])


def composition_of(
    mechanism: NoisySGD,
    order: float,
    convention: str,
    hoelder_p: float | None,
    mode: str,
    tolerance: float = 0.0,
) -> Composition:
    """Check the arguments of a composition and return them together.

    Args:
        mechanism: The run's mechanism; its number of updates limits p.
        order: Rényi order, above 1.
        convention: One of ``CONVENTIONS``.
        hoelder_p: p, or None for 3·num_steps.
        mode: As in ``log_moment``.
        tolerance: As in ``privacy_losses``.

    Returns:
        The composition.

    Raises:
        ValueError: If an argument is outside its domain, or p is so small that the
            order of the first update exceeds 1e6.
    """
    one_number(order=order, remedy="Call once for each order.")
    in_range(1, math.inf, closed=False, order=order, remedy="Try 8.")
    expect(
        convention in CONVENTIONS,
        "convention",
        repr(convention),
        f"must be in {CONVENTIONS}",
        'Try "corrected", the default.',
    )
    expect(
        mode in MODES,
        "mode",
        repr(mode),
        f"must be in {MODES}",
        'Try "exact", the default.',
    )
    remedy = (
        "Leave it out (default: 3·num_steps), or choose it before looking at the "
        "runs. The best p for the runs that are averaged would give the plain sum of "
        "their losses, which is not a bound."
    )
    p = default_hoelder_p(mechanism.num_steps) if hoelder_p is None else hoelder_p
    numeric = isinstance(p, (int, float, np.number))
    expect(numeric and p > 1, "hoelder_p", p, "must be a number above 1", remedy)
    expect(
        math.isfinite(p) or convention == "corrected",
        "hoelder_p",
        p,
        f"must be finite under {convention}",
        "Pass a finite p: the published coefficient grows without limit in p.",
    )
    highest = float(corrected_order(order, p, mechanism.num_steps))
    require(
        highest <= _HIGHEST_ORDER,
        f"With {mechanism.num_steps} updates and hoelder_p={p:g}, order {order:g} "
        f"grows to {highest:.3g} for the first update; at most {_HIGHEST_ORDER:g} is "
        "allowed.",
        "Choose hoelder_p of about num_steps or larger.",
    )
    return Composition(float(order), convention, float(p), mode, float(tolerance))
