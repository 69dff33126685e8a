r"""Standard errors and upper limits of losses that are estimated from observed norms.

An observed ledger has the norms of an example only where a batch drew it. Which updates
these were is chance, so the estimate of its loss has a sampling error.

``standard_errors`` says how large the error is to be expected, by the model that makes
the estimate (``ledger.smoothed_ranks``). ``loss_limits`` and ``epsilon_limits`` are
limits that the true value exceeds in at most 5 % of all draws, and need no model.

**Idea of the limit.** The losses of an example's draws are a random sample of the
losses of all updates, each between 0 and that of the clip norm, F. One more value, F,
is added to the sample; the values get random weights that are uniform on the simplex
(Dirichlet(1, …, 1)), and the limit is the 95 % quantile of their weighted mean (Gaffke
2005). For a sample of 0 and F this is the exact limit of Clopper and Pearson. Instead
of drawing weights, the quantile is that of the Beta distribution on [least value, F]
with the same mean and variance.

**Guarantee.** The limit's coverage is conjectured, not proved, for all distributions on
an interval; it is simulated in the tests and measured by
``benchmarks.observed_vs_exact``. It is about the sampling of draws alone: another run
of the training has other norms. It holds for each example, not for all together, and is
never above the worst case.

**What breaks it.** Draws that depend on the weights; an example whose own draws steer
its norms; norms that an engine did not observe because samples were unattributed: each
example is assumed to have its share of these samples, at the clip norm.

Source: Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the
mean of a nonnegative variable" (Mathematical Methods of Statistics 14, 2005); own
derivation of the Beta distribution, docs/theory.md, Section 14.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.accounting.assumed_noise import require_real_noise
from opacus_pi.accounting.conversion import check_delta, check_orders, epsilon_offset
from opacus_pi.accounting.epsilon import DEFAULT_TOLERANCE, epsilons
from opacus_pi.accounting.losses import (
    Composition,
    RunNorms,
    composition_of,
    loss_of_interval,
    privacy_losses,
    worst_case_loss,
)
from opacus_pi.accounting.predicted_losses import PredictedNorms
from opacus_pi.accounting.rules import UpdateInterval, intervals
from opacus_pi.accounting.tables import check_tolerance
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger

__all__ = ["epsilon_limits", "loss_limits", "standard_errors"]

Array = NDArray[np.float64]
_CLIPPED = np.array([np.inf])
_MANY = 1 << 18  # number of norms above which tables are used by default
_LIMIT_ORDERS = (
    1.1,
    1.25,
    1.5,
    1.75,
    2,
    2.5,
    3,
    4,
    5,
    6,
    8,
    10,
    12,
    16,
    20,
    32,
    48,
    64,
)


def standard_errors(
    ledger: GradNormLedger,
    order: float,
    *,
    hoelder_p: float | None = None,
    tolerance: float = 0.0,
) -> Array:
    """Return standard errors of ``privacy_losses`` for a run with observed norms.

    The model behind the losses (``ledger.smoothed_ranks``) splits an example's rank
    among the norms into a part that changes slowly and noise. An error in the slow part
    stays until the next draws of the example correct it, so neighbouring rows share it.
    The noise of different rows is independent.

    Args:
        ledger: One run.
        order: Rényi order, above 1.
        hoelder_p: As in ``privacy_losses``.
        tolerance: As in ``privacy_losses``.

    Returns:
        float64 ``(n,)``, in nats; 0 for a ledger without gaps. A standard error is an
        average over examples with similar norms; use ``loss_limits`` for a limit that
        holds for each example.

    Raises:
        ValueError: If an argument is outside its domain.
        AccountingError: If a link of the chain of custody is broken.
    """
    _require_one_run(ledger)
    check_tolerance(tolerance, num_runs=1)
    composition = composition_of(
        ledger.mechanism, order, "corrected", hoelder_p, "exact", tolerance
    )
    variance, shared = np.zeros((2, ledger.num_examples))
    predicted = PredictedNorms.of(ledger)
    if predicted is None:
        return variance
    ranks, before = predicted.ranks, 0.0
    for row in _rows_of(ledger):
        loss = partial(_loss_of_row, ledger, composition, row)
        slow, noise = predicted.variances(row.place, loss)
        counts = ledger.participations
        if counts is not None:
            share = counts[row.place] / (row.rate * row.num_updates)
            slow, noise = share * slow, share**2 * noise
        time = ranks.times[row.place]
        shared *= math.exp((before - time) / ranks.error_time_scale)
        shared += slow
        variance += slow * (2 * shared - slow) + noise  # slow with itself counts once
        before = time
    return np.sqrt(variance)


def loss_limits(
    ledger: GradNormLedger,
    order: float,
    *,
    confidence: float = 0.95,
    hoelder_p: float | None = None,
    tolerance: float = 0.0,
) -> Array:
    """Return upper limits of the losses, over the random draws of the batches.

    The limit of an example comes from its own draws. It is never below the estimate of
    ``privacy_losses``, which also uses the draws of other examples.

    Args:
        ledger: One run with observed norms. If norms were swept at every update, the
            limits are the losses themselves.
        order: Rényi order, above 1.
        confidence: Probability over the draws of the batches, in (0, 1), that an
            example's limit is at least its true loss: the loss that its norms at every
            update would give.
        hoelder_p: As in ``privacy_losses``.
        tolerance: As in ``privacy_losses``.

    Returns:
        float64 ``(n,)``, in nats, never above ``worst_case_loss``, which an example
        without any draw gets. Under fixed sampling, where an example is in exactly the
        updates that drew it, participations whose norm is not in the ledger are charged
        the clip norm. ``inf`` without clipping.

    Raises:
        ValueError: If an argument is outside its domain, or norms were swept only now
            and then.
        AccountingError: If a link of the chain of custody is broken.
    """
    _check_confidence(confidence)
    _require_one_run(ledger)
    _require_limited_norms(ledger)
    check_tolerance(tolerance, num_runs=1)
    composition = composition_of(
        ledger.mechanism, order, "corrected", hoelder_p, "exact", tolerance
    )
    estimates = privacy_losses(ledger, order, hoelder_p=hoelder_p, tolerance=tolerance)
    return np.maximum(_limits(ledger, composition, confidence), estimates)


def epsilon_limits(
    ledger: GradNormLedger,
    delta: float,
    *,
    confidence: float = 0.95,
    orders: ArrayLike | None = None,
    hoelder_p: float | None = None,
    tolerance: float | None = None,
    composition: str = "renyi",
) -> Array:
    """Return upper limits of the epsilons, over the random draws of the batches.

    At each order the limit of ``loss_limits`` is converted to ε. The smallest of these
    is returned, but never less than the estimate of ``epsilons``. The smallest of
    several limits may hold less often than each of them: how often it holds was
    measured, not derived.

    Args:
        ledger: As in ``loss_limits``.
        delta: δ in (0, 1).
        confidence: As in ``loss_limits``.
        orders: Rényi orders to choose from, above 1. Default: 18 from 1.1 to 64.
        hoelder_p: As in ``privacy_losses``.
        tolerance: As in ``privacy_losses``. Default: 1e-3 for a run with more than
            262,144 norms (rows times examples), else 0.
        composition: ``"renyi"``, the only one here. In ``epsilons``, those of
            ``"numerical"`` are never above those of ``"renyi"``.

    Returns:
        float64 ``(n,)``, at least 0.

    Raises:
        ValueError: If an argument is outside its domain, norms were swept only now and
            then, or the ledger's noise was assumed.
        AccountingError: If a link of the chain of custody is broken.
    """
    expect(
        composition == "renyi",
        "composition",
        repr(composition),
        'must be "renyi"',
        "Leave it out: limits are computed at Rényi orders. They are limits for "
        'epsilons(composition="numerical"), too, which are never above the others.',
    )
    _require_one_run(ledger)
    asked = tolerance
    if tolerance is None:
        is_large = ledger.grad_norms.size > _MANY
        tolerance = DEFAULT_TOLERANCE if is_large else 0.0
    least = epsilon_limits_of_draws(
        ledger,
        delta,
        confidence=confidence,
        orders=orders,
        hoelder_p=hoelder_p,
        tolerance=tolerance,
    )
    estimates = epsilons(ledger, delta, orders=orders, tolerance=asked)
    result: Array = np.maximum(least, estimates)
    return result


def epsilon_limits_of_draws(
    ledger: GradNormLedger,
    delta: float,
    *,
    confidence: float = 0.95,
    orders: ArrayLike | None = None,
    hoelder_p: float | None = None,
    tolerance: float = 0.0,
) -> Array:
    """Return the limits that follow from the draws alone, maybe below the estimates.

    Args:
        ledger: As in ``epsilon_limits``, as are the other arguments.
        delta: δ in (0, 1).
        confidence: Probability that the limit of an example is not exceeded.
        orders: Rényi orders to choose from, above 1.
        hoelder_p: As in ``privacy_losses``.
        tolerance: As in ``privacy_losses``.

    Returns:
        float64 ``(n,)``.

    Raises:
        ValueError: As ``epsilon_limits``.
        AccountingError: As ``epsilon_limits``.
    """
    check_delta(delta)
    _check_confidence(confidence)
    _require_one_run(ledger)
    _require_limited_norms(ledger)
    require_real_noise((ledger,))
    check_tolerance(tolerance, num_runs=1)
    choices = np.unique(check_orders(_LIMIT_ORDERS if orders is None else orders))
    least = np.full(ledger.num_examples, np.inf)
    for order, offset in zip(choices, epsilon_offset(choices, delta), strict=True):
        composition = composition_of(
            ledger.mechanism, order, "corrected", hoelder_p, "exact", tolerance
        )
        least = np.minimum(least, _limits(ledger, composition, confidence) + offset)
    return least


def _require_limited_norms(ledger: GradNormLedger) -> None:
    """Refuse swept rows with updates between them, whose norms nothing limits.

    Observed norms are a sample of all updates. Swept rows are not: if norms fall within
    the first epoch, rows at the ends of epochs show nothing of it.
    """
    most = int(ledger.updates_of_rows().max()) if ledger.source == "swept" else 1
    expect(
        most == 1,
        "ledger",
        f"swept rows that stand for up to {most} updates each",
        "must have observed norms, or swept ones of every update, because nothing "
        "limits the norms between swept rows",
        "Record with Recorder(). The worst case is a bound for every ledger.",
    )


def _limits(
    ledger: GradNormLedger, composition: Composition, confidence: float
) -> Array:
    """Return the limits at one order; the arguments are checked."""
    mechanism = ledger.mechanism
    worst = worst_case_loss(mechanism, composition.order, steps=ledger.steps)
    rows = _rows_of(ledger)
    loss = partial(_loss_of_row, ledger, composition)
    if not math.isfinite(worst):
        return np.full(ledger.num_examples, worst)
    if mechanism.sampling != "poisson":
        return np.minimum(_of_counts(ledger, rows, loss, worst), worst)
    if ledger.source == "swept":
        total = sum((loss(row, row.norms) for row in rows), np.zeros(1))
        return np.minimum(total, worst)
    return np.minimum(_of_draws(ledger, rows, loss, confidence), worst)


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of a ledger, and the updates that it stands for.

    Args:
        place: Its position.
        parts: Those updates.
        num_updates: Their number.
        rate: Sample rate of each of them.
        norms: float64 ``(n,)``, the clip norm (infinity) where nothing was observed.
        drawn: bool ``(n,)``, where a norm was observed.
    """

    place: int
    parts: list[UpdateInterval]
    num_updates: int
    rate: float
    norms: Array
    drawn: NDArray[np.bool_]


def _rows_of(ledger: GradNormLedger) -> list[_Row]:
    """Return the rows of a ledger that stand for an update."""
    parts = intervals(ledger.steps, ledger.mechanism.num_steps)
    counts = ledger.updates_of_rows().tolist()
    rows = [
        _Row(
            place,
            [part for part in parts if part.right == place],
            counts[place],
            float(ledger.mechanism.at_row(place).sample_rate),
            np.nan_to_num(norms.astype(np.float64), nan=np.inf),
            ~np.isnan(norms),
        )
        for place, norms in enumerate(ledger.grad_norms)
    ]
    return [row for row in rows if row.parts]


def _loss_of_row(
    ledger: GradNormLedger, composition: Composition, row: _Row, norms: Array
) -> Array:
    """Return the losses of all updates of a row at any norms ``(m,)``.

    Under fixed sampling each update counts with the sample rate.
    """
    every = np.broadcast_to(norms, (1, ledger.num_rows, len(norms)))
    runs = RunNorms(ledger.mechanism, ledger.steps, every)
    total = np.zeros(len(norms))
    for part in row.parts:
        total += loss_of_interval(runs, composition, part, row.place)
    return total


def _of_counts(
    ledger: GradNormLedger,
    rows: Sequence[_Row],
    loss: Callable[[_Row, Array], Array],
    worst: float,
) -> Array:
    """Return the limits under fixed sampling, where every participation is counted.

    Of several participations in a row only the last one's norm is known; the others are
    charged the clip norm.
    """
    if ledger.participations is None:
        return np.full(ledger.num_examples, worst)
    total = np.zeros(ledger.num_examples)
    for row in rows:
        counts = ledger.participations[row.place]
        once = loss(row, row.norms) / (row.rate * row.num_updates)
        clipped = float(loss(row, _CLIPPED)[0]) / (row.rate * row.num_updates)
        seen = np.minimum(counts, row.drawn)
        total += np.where(seen, once, 0.0) + (counts - seen) * clipped
    return total


def _of_draws(
    ledger: GradNormLedger,
    rows: Sequence[_Row],
    loss: Callable[[_Row, Array], Array],
    confidence: float,
) -> Array:
    """Return the limits under Poisson sampling, from the draws of each example.

    A draw comes from an update with probability in proportion to the sample rate, so
    losses of updates are divided by it: the mean over draws of these is the loss
    divided by the sum of the rates.
    """
    rows = [row for row in rows if row.rate > 0]
    if not rows:
        return np.zeros(ledger.num_examples)
    clipped = [float(loss(row, _CLIPPED)[0]) for row in rows]
    per_rate = [row.rate * row.num_updates for row in rows]
    largest = max(c / r for c, r in zip(clipped, per_rate, strict=True))
    shape = (ledger.num_examples,)
    least, sums, squares, counts = (np.ones(shape), *np.zeros((3, *shape)))
    for row, rate in zip(rows, per_rate, strict=True):
        share = loss(row, row.norms) / rate / largest
        least = np.where(row.drawn, np.minimum(least, share), least)
        share = np.where(row.drawn, share, 0.0)
        sums, squares, counts = sums + share, squares + share**2, counts + row.drawn
    extra = 1 + counts * _odds_of_unattributed(ledger)
    mean = _quantile_of_mean(least, sums, squares, counts, extra, confidence)
    return largest * sum(per_rate) * mean


def _odds_of_unattributed(ledger: GradNormLedger) -> float:
    """Return how many unattributed samples there were for each attributed one."""
    if ledger.custody is None or not ledger.custody.num_samples:
        return 0.0
    share = ledger.custody.num_unattributed / ledger.custody.num_samples
    return share / (1 - share) if share < 1 else math.inf


def _quantile_of_mean(
    least: Array,
    sums: Array,
    squares: Array,
    counts: Array,
    extra: Array,
    confidence: float,
) -> Array:
    """Return a quantile of the mean of values in [0, 1] under random weights.

    Args:
        least: Least value of each sample.
        sums: Sum of its values.
        squares: Sum of their squares.
        counts: Number of values.
        extra: Total weight of the values of 1 that are added, at least 1.
        confidence: Which quantile.

    Returns:
        float64, as the arguments; 1 for a sample without values.
    """
    from scipy.special import betaincinv  # takes a quarter of a second

    width = np.maximum(1 - least, 1e-12)
    size = counts + extra
    first = (sums - counts * least) / width + extra
    second = (squares - 2 * least * sums + counts * least**2) / width**2 + extra
    mean = np.clip(first / size, 1e-12, 1 - 1e-12)
    # The weights have a Dirichlet distribution, so the weighted mean has this variance.
    variance = np.maximum(second / size - mean**2, 1e-15) / (size + 1)
    weight = np.maximum(mean * (1 - mean) / variance - 1, 1e-9)
    quantile = betaincinv(mean * weight, (1 - mean) * weight, confidence)
    result: Array = np.where(counts > 0, least + width * quantile, 1.0)
    return np.minimum(result, 1.0)


def _require_one_run(ledger: GradNormLedger) -> None:
    """Refuse several runs, and a run whose chain of custody is broken."""
    expect(
        isinstance(ledger, GradNormLedger),
        "ledger",
        type(ledger).__name__,
        "must be one GradNormLedger",
        "Standard errors and limits follow from the draws of one run: call this "
        "function for each run.",
    )
    ledger.require_intact()


def _check_confidence(confidence: float) -> None:
    """Raise ``ValueError`` for a confidence outside (0, 1)."""
    in_range(
        0,
        1,
        closed=False,
        confidence=confidence,
        remedy="Pass 0.95 for limits that hold for 95 % of all draws.",
    )
