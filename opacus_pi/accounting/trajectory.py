r"""Privacy losses from sums along whole runs, and confidence limits from a few runs.

**Idea.** ``composition`` applies Hölder's inequality at every update. Here it is
applied once, to the whole run: with κ > 1 and the plain sum S of a run's losses at the
order 1 + κ/(κ-1)·(order-1),

:math:`D_\alpha \le \frac{1}{\kappa(\alpha-1)} \ln E\,e^{\kappa(\alpha-1) S}`.

The expectation over runs can be estimated by a mean, or bounded with high probability,
because clipping bounds S.

**Guarantee.** ``trajectory_losses`` is an estimate: its mean is over the few runs
given. ``trajectory_limits`` are upper limits that hold with the stated confidence,
whatever the data. ``exceedance_limit`` bounds the probability that a run's loss exceeds
a budget.

**What breaks it.** A κ chosen on the runs that are averaged. For the limits: rows that
are not stratified, norms other than those that training clips (dropout, augmented
inputs), runs that share their random draws, or no clipping.

Source: docs/theory.md, Section 3.

>>> round(exceedance_limit(0, 300, confidence=0.95), 4)  # none of 300 runs above
0.0099
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from opacus_pi._validate import expect, in_range
from opacus_pi.accounting.assumed_noise import require_real_noise
from opacus_pi.accounting.composition import (
    mean_over_runs,
)
from opacus_pi.accounting.losses import (
    Composition,
    Ledgers,
    RunNorms,
    composition_of,
    loss_of_interval,
    norms_of_runs,
    total_loss,
    worst_case_loss,
)
from opacus_pi.accounting.rules import STRATIFIED, UpdateInterval
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of
from opacus_pi.ledger.mechanism import NoisySGD

Array = NDArray[np.float64]


def trajectory_losses(
    ledgers: Ledgers,
    order: float,
    kappa: float,
    *,
    rule: str = "right",
    mode: str = "exact",
) -> Array:
    """Return Rényi privacy losses by one use of Hölder's inequality for the whole run.

    They are smaller than ``privacy_losses`` for long runs with fluctuating norms, and
    larger at high orders with small sample rates.

    Args:
        ledgers: Independent runs of the same training procedure, over which the
            expectation is the mean; their rows may be at different updates.
        order: Rényi order, above 1.
        kappa: κ, above 1, the exponent of Hölder's inequality: 2 is usual, and a larger
            one needs more runs. Choose it before looking at the runs. ``inf`` takes,
            instead of a mean over the runs, the largest of them.
        rule: As in ``privacy_losses``.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``, in nats: an estimate of a bound.

    Raises:
        ValueError: As for ``privacy_losses``; or if ``kappa`` is not above 1.

    Source: docs/theory.md, Section 3.
    """
    expect(
        kappa > 1,
        "kappa",
        kappa,
        "must be above 1",
        "Try 2; a larger value needs more runs.",
    )
    runs = runs_of(ledgers, same_steps=False)
    inner = _plain_sum_composition(runs[0].mechanism, order, kappa, mode)
    return trajectory_losses_of_sums(_sums_of_runs(runs, inner, rule), order, kappa)


def trajectory_losses_of_sums(sums: Array, order: float, kappa: float) -> Array:
    """Return the divergence from whole runs' sums, by one use of Hölder's inequality.

    D(order) <= ln E exp(κ(order-1)·S)/(κ(order-1)), where S = Σ_t D_t at the order
    1 + κ/(κ-1)·(order-1) along one run.

    Args:
        sums: S of each run, ``(R, n)``, in nats.
        order: Rényi order, above 1.
        kappa: κ, above 1; ``inf``: the largest of the runs.

    Returns:
        float64 ``(n,)``, in nats.
    """
    return mean_over_runs(sums, kappa * (order - 1))


def trajectory_limits(
    ledgers: Ledgers,
    order: float,
    kappa: float,
    *,
    confidence: float = 0.95,
    mode: str = "exact",
) -> Array:
    """Return upper confidence limits of the Rényi divergence, from independent runs.

    Let S be the sum of an example's losses along one run, at the order that
    ``trajectory_losses`` uses. X = exp(κ(order-1)·S) lies in [1, b], where b follows
    from the clip norm. By Hoeffding's inequality, with N runs and β = 1 - confidence,

        E X <= mean X + (b-1)·√(ln(1/β) / 2N)   with probability 1 - β.

    The rows must be stratified. The sum over the rows then takes the place of S: its
    mean is S, so by Jensen's inequality the mean of X is not smaller than with all
    updates. A row before every update is the special case of strata of one update. The
    limits are useful while κ(order-1)·(largest S) is about 1; otherwise the worst case
    is smaller and is returned.

    The swept norms must be the norms that training clips. With dropout or augmented
    inputs the model in evaluation mode has other norms, and these values are not
    limits.

    Args:
        ledgers: Independent runs of the same training procedure with
            ``Recorder.stratified``, each with its own draws.
        order: Rényi order, above 1.
        kappa: κ, above 1, finite and chosen before looking at the runs.
        confidence: 1 - β, in (0, 1), for each example separately. For m statements at
            once use 1 - β/m.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``, in nats, never above the worst case. Whatever the data, each
        is below the divergence of training with the example from training without it
        with probability at most β.

    Raises:
        ValueError: As for ``privacy_losses``; or if gradients were not clipped,
            sampling is not Poisson, a norm is missing, the runs share their draws, or a
            ledger's noise was assumed, so that it supports nothing but a ranking.

    Source: docs/theory.md, Section 3; Hoeffding 1963, Theorem 2.
    """
    remedy = "Choose it before looking at the runs, for example 2."
    in_range(1, math.inf, closed=False, kappa=kappa, remedy=remedy)
    remedy = "Pass 0.95, for example."
    in_range(0, 1, closed=False, confidence=confidence, remedy=remedy)
    runs = runs_of(ledgers, same_steps=False)
    mechanism = runs[0].mechanism
    require_real_noise(runs)
    _check_bounded(runs)
    inner = _plain_sum_composition(mechanism, order, kappa, mode)
    power = kappa * (order - 1)
    log_values = power * _sums_of_runs(runs, inner, STRATIFIED)
    top = power * _largest_sum(mechanism, runs[0].num_rows, inner)
    with np.errstate(divide="ignore"):
        log_width = top + np.log(-np.expm1(-top))  # ln(b - 1)
    log_margin = log_width + math.log(-math.log1p(-confidence) / (2 * len(runs))) / 2
    log_limit = np.logaddexp(mean_over_runs(log_values, 1.0), log_margin)
    worst = worst_case_loss(mechanism, order, steps=runs[0].steps)
    result: Array = np.minimum(np.minimum(log_limit, top) / power, worst)
    return result


def exceedance_limit(
    num_above: int, num_runs: int, *, confidence: float = 0.95
) -> float:
    """Return an upper confidence limit of the probability that a loss exceeds a budget.

    With no run above the budget it is 1 - β^(1/N), β = 1 - confidence; otherwise the
    limit of Clopper and Pearson.

    Use it as follows. Let S be the sum of an example's losses at order a over a run,
    and B a budget chosen beforehand. For every event E

        P(E) <= e^ε·Q(E) + δ + P(S > B),   ε = rdp_to_epsilon([B], [a], δ),

    because a run that leaves the example out before it would exceed B differs from the
    run that was made only if S > B.

    Args:
        num_above: Number of independent runs with S > B. S must be the sum over all
            updates: a sum over a few rows may be below B by chance, even if unbiased.
        num_runs: Number of runs, N.
        confidence: 1 - β, in (0, 1).

    Returns:
        The limit of P(S > B), in (0, 1].

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Clopper and Pearson 1934; Feldman and Zrnic (arXiv:2008.11193) for the run
    that leaves the example out.
    """
    remedy = "Pass 0.95, for example."
    in_range(0, 1, closed=False, confidence=confidence, remedy=remedy)
    in_range(1, math.inf, num_runs=num_runs, remedy="Pass the number of runs.")
    in_range(
        0,
        num_runs,
        num_above=num_above,
        remedy="Pass how many of the runs exceeded the budget.",
    )
    if num_above == num_runs:
        return 1.0
    if num_above == 0:
        return -math.expm1(math.log1p(-confidence) / num_runs)
    tail = stats.beta(num_above + 1, num_runs - num_above)
    return float(tail.ppf(confidence))


def _plain_sum_composition(
    mechanism: NoisySGD, order: float, kappa: float, mode: str
) -> Composition:
    """Return the composition of a run's plain sum, at the inner order."""
    composition_of(mechanism, order, "corrected", None, mode)  # checks the order
    ratio = 1.0 if math.isinf(kappa) else kappa / (kappa - 1)
    inner_order = 1 + ratio * (order - 1)
    return composition_of(mechanism, inner_order, "corrected", math.inf, mode)


def _sums_of_runs(
    runs: Sequence[GradNormLedger], inner: Composition, rule: str
) -> Array:
    """Return the plain sum of each run, ``(R, n)``."""
    return np.stack([total_loss(norms_of_runs(run, rule), inner, rule) for run in runs])


def _largest_sum(mechanism: NoisySGD, num_rows: int, inner: Composition) -> float:
    """Return an upper limit of all sums: each update at C in the worst row."""
    unbounded = np.full((1, num_rows, 1), math.inf)  # ratios() clips these norms to C
    one_update = replace(mechanism, num_steps=1)
    clipped = RunNorms(one_update, np.arange(num_rows), unbounded)
    rows = [UpdateInterval(1, 1, row, row) for row in range(num_rows)]
    each = [float(loss_of_interval(clipped, inner, row, row.right)[0]) for row in rows]
    return mechanism.num_steps * max(each, default=0.0)


def _check_bounded(runs: Sequence[GradNormLedger]) -> None:
    """Raise ``ValueError`` unless the sums are bounded and independent between runs."""
    mechanism = runs[0].mechanism
    expect(
        bool(np.isfinite(mechanism.max_grad_norm).all()),
        "max_grad_norm",
        mechanism.max_grad_norm,
        "must be finite",
        "Record runs that clip: without clipping, a few runs do not limit the largest "
        "losses.",
    )
    expect(
        mechanism.sampling == "poisson",
        "sampling",
        repr(mechanism.sampling),
        'must be "poisson"',
        "Record runs with poisson_sampling=True: under fixed sampling, losses depend "
        "on which updates contained the example.",
    )
    unknown = sum(int(np.isnan(run.grad_norms).sum()) for run in runs)
    expect(
        unknown == 0,
        "grad_norms",
        f"{unknown} NaN (not observed)",
        "must have a norm of every example in every row",
        "Record with a recorder that sweeps, such as Recorder.stratified.",
    )
    steps = {tuple(run.steps.tolist()) for run in runs}
    complete = runs[0].num_rows == mechanism.num_steps
    expect(
        len(steps) > 1 or len(runs) == 1 or complete,
        "ledgers",
        f"{len(runs)} runs with the same steps",
        "must have rows that were drawn independently",
        "Give each run's Recorder.stratified a generator with another seed.",
    )
