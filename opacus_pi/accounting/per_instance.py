"""Per-example Rényi privacy losses of a recorded training run.

>>> from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
>>> from opacus_pi.ledger.mechanism import NoisySGD
>>> mechanism = NoisySGD(
...     num_steps=100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0
... )
>>> ledger = GradNormLedger(mechanism, steps=[50, 100], grad_norms=[[0.1, 5], [0.1, 5]])
>>> privacy_losses(ledger, order=8).round(4)
array([0.0117, 1.3725])

A value from one run puts that run's norms where the theorems have an expectation over
runs: it is an estimate. What no run can exceed is ``worst_case_loss``.
"""

import math

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.accounting.rules import (
    Interval,
    intervals,
    once_an_epoch,
)
from opacus_pi.accounting.run_losses import (
    Ledgers,
    Record,
    composition_of,
    loss_of_interval,
    record_of,
    total_loss,
)
from opacus_pi.ledger.mechanism import SCHEDULED, NoisySGD

Array = NDArray[np.float64]


def privacy_losses(
    ledger: Ledgers,
    order: float,
    *,
    convention: str = "corrected",
    rule: str = "right",
    hoelder_p: float | None = None,
    mode: str = "exact",
    tolerance: float = 0.0,
) -> Array:
    """Rényi privacy loss of every example over a whole training run.

    Args:
        ledger: One run, or several independent runs of the same training, over which
            the expectations are taken.
        order: Rényi order, above 1.
        convention: ``"corrected"``: the theorem as its proof gives it, and never above
            the worst case where gradients were clipped. ``"icml2025"`` and
            ``"thudi2024_code"``: as published, for reproduction; their orders are
            rounded up whatever ``mode`` says, and each row's value is multiplied by
            the number of updates it speaks for.
        rule: Which row speaks for which updates: ``"right"`` (the paper's),
            ``"left"``, ``"trapezoid"`` or ``"max"``; ``"stratified"`` for rows of
            ``Recorder.stratified``: for each example unbiased for one run's sum over
            all its updates.
        hoelder_p: The p of Hölder's inequality, above 1 and fixed beforehand. Default:
            3·num_steps, the paper's; ``inf``: the plain sum over the updates.
        mode: How moments are taken at real orders, as in ``log_moment``.
        tolerance: 0: no rounding. From 1e-8 to 1, for one run: moments are read off
            tables, which makes the losses at most that much larger, relatively, never
            smaller, and tens of thousands of examples many times faster.

    Returns:
        float64 ``(n,)``, in nats: an estimate of a bound on the Rényi divergence of
        training with the example from training without it. One run stands in for the
        expectations, a few rows for all updates. ``worst_case_loss`` is a bound.

    Raises:
        ValueError: If an argument is outside its domain, the runs do not belong
            together, or the mechanism has no noise.

    Source: Sepahvand et al. (ICML 2025), Definition 4.2 and Section 5.1, after Thudi
    et al. (arXiv:2307.00310), Theorem 3.3.
    """
    record = record_of(ledger, rule, tolerance)
    how = composition_of(
        record.mechanism, order, convention, hoelder_p, mode, tolerance
    )
    losses = total_loss(record, how, rule)
    if convention != "corrected":
        return losses
    worst = worst_case_loss(record.mechanism, order, steps=record.steps)
    return np.minimum(losses, worst)


def per_step_losses(
    ledger: Ledgers,
    order: float,
    *,
    convention: str = "corrected",
    hoelder_p: float | None = None,
    mode: str = "exact",
) -> Array:
    """What a single update contributes at each row of the ledger.

    Row i is the contribution of update ``steps[i]`` (a row at 0: of the first update;
    under ``"thudi2024_code"`` of its update number 0), with that row's norms.

    Args:
        ledger: As in ``privacy_losses``.
        order: Rényi order, above 1.
        convention: As in ``privacy_losses``.
        hoelder_p: As in ``privacy_losses``.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(N, n)``, in nats.

    Raises:
        ValueError: As ``privacy_losses``.
    """
    record = record_of(ledger)
    how = composition_of(record.mechanism, order, convention, hoelder_p, mode)
    first = 0 if convention == "thudi2024_code" else 1
    losses = np.empty(record.norms.shape[1:])
    for row, step in enumerate(record.steps):
        update = max(int(step), first)
        losses[row] = loss_of_interval(
            record, how, Interval(update, update, row, row), row
        )
    return losses


def worst_case_loss(
    mechanism: NoisySGD, order: float, *, steps: ArrayLike | None = None
) -> float:
    """Rényi differential privacy of the mechanism: the loss with ‖g‖ = C throughout.

    On a fixed schedule an example is in one update of every epoch, and in which one is
    not known: an epoch that was broken off counts in full.

    Args:
        mechanism: The run's facts.
        order: Rényi order, above 1.
        steps: The ledger's steps ``(N,)``; needed where the mechanism has a schedule,
            whose values hold up to each row.

    Returns:
        The divergence, in nats; ``inf`` without clipping.

    Raises:
        ValueError: If an argument is outside its domain or the steps are missing.
    """
    how = composition_of(mechanism, order, "corrected", math.inf, "exact")
    scheduled = [name for name in SCHEDULED if np.ndim(getattr(mechanism, name))]
    expect(
        steps is not None or not scheduled,
        "steps",
        None,
        f"to say where {', '.join(scheduled)} changes",
        "Pass the ledger's steps.",
    )
    rows = np.asarray(steps) if scheduled else np.array([mechanism.num_steps])
    if mechanism.sampling != "poisson":
        parts = intervals(rows, mechanism.num_steps)
        facts = [mechanism.at_row(part.right) for part in parts]
        costs = [order * float(f.ratios(math.inf)) ** 2 / 2 for f in facts]
        return once_an_epoch(parts, [float(f.sample_rate) for f in facts], costs)
    unbounded = np.full((1, len(rows), 1), math.inf)
    return float(total_loss(Record(mechanism, rows, unbounded), how, "right")[0])
