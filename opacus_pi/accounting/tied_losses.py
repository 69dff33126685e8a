"""Why many examples share the largest loss, and at which order fewer of them do.

There are two causes. The gradients of an example may be clipped in every update: its
loss is the worst case at every order, and only training with a larger clip norm tells
such examples apart. Or the estimate of its loss is above the worst case and is cut to
it. The theorem takes early updates at up to 1.5 times the order (``composition``). So
estimates are most above the worst case where a loss rises steeply with the order,
which is at middle orders, and less at lower and at higher ones.

>>> from opacus_pi.ledger.mechanism import NoisySGD
>>> mechanism = NoisySGD(105, sample_rate=0.05, noise_std=1.0, max_grad_norm=1.0)
>>> norms = [[9.0, 0.95, 0.95, 0.1]]
>>> ledger = GradNormLedger(mechanism, steps=[105], grad_norms=norms)
>>> losses = privacy_losses(ledger, 7)
>>> tied_losses(ledger, losses, 7)
TiedLosses(num_clipped=1, num_cut=2, other_order=1.5, num_at_other=1)
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.losses import Ledgers, privacy_losses, worst_case_loss
from opacus_pi.ledger.grad_norm_ledger import (
    GradNormLedger,
    joint_mechanism,
    runs_of,
)

__all__ = ["TiedLosses", "always_clipped", "tied_losses"]

_ORDERS = (1.5, 2.0, 4.0, 16.0, 32.0, 64.0)
_EQUAL = 1 - 1e-12  # losses that differ by less are equal
_FEWER = 0.9  # of the ties: another order is worth naming if it has at most this share


@dataclass(frozen=True)
class TiedLosses:
    """Numbers of examples whose loss is the worst case, by cause.

    Args:
        num_clipped: Those whose recorded norms are all at or above the clip norm.
        num_cut: The others: their estimates were above the worst case.
        other_order: The order that was tried at which the fewest examples have the
            worst case; None if none of them has clearly fewer, or if ``num_cut`` is 0.
        num_at_other: How many examples have the worst case at that order.
    """

    num_clipped: int
    num_cut: int
    other_order: float | None = None
    num_at_other: int | None = None


def tied_losses(
    ledger: Ledgers,
    losses: NDArray[np.float64],
    order: float,
    *,
    tolerance: float = 0.0,
) -> TiedLosses:
    """Return why losses equal the worst case, and an order at which fewer do.

    Args:
        ledger: As in ``privacy_losses``.
        losses: What ``privacy_losses`` returned at ``order``, ``(n,)``, in nats.
        order: Rényi order of the losses, above 1.
        tolerance: That of ``privacy_losses``, for the losses at other orders.

    Returns:
        All numbers are 0 if gradients were not clipped: then there is no worst case.
    """
    runs = runs_of(ledger)
    tied = _at_worst_case(runs, losses, order)
    num_clipped = int(np.count_nonzero(tied & always_clipped(runs)))
    num_cut = int(np.count_nonzero(tied)) - num_clipped
    found = TiedLosses(num_clipped, num_cut)
    if not num_cut:
        return found
    counts = {}
    for other in _ORDERS:
        there = privacy_losses(runs, other, tolerance=tolerance)
        counts[other] = int(np.count_nonzero(_at_worst_case(runs, there, other)))
    best = min(counts, key=lambda each: counts[each])
    if counts[best] > _FEWER * (num_clipped + num_cut):
        return found
    return TiedLosses(num_clipped, num_cut, best, counts[best])


def always_clipped(ledger: Ledgers) -> NDArray[np.bool_]:
    """Return which examples have only recorded norms at or above the clip norm.

    Args:
        ledger: As in ``privacy_losses``.

    Returns:
        bool ``(n,)``. An example without a recorded norm is charged at the clip norm,
        and counts as clipped.
    """
    runs = runs_of(ledger)
    clip = np.reshape(joint_mechanism(runs).max_grad_norm, (-1, 1))
    below = [(run.grad_norms < clip).any(axis=0) for run in runs]  # NaN: not below
    found: NDArray[np.bool_] = ~np.any(below, axis=0)
    return found


def _at_worst_case(
    runs: tuple[GradNormLedger, ...], losses: NDArray[np.float64], order: float
) -> NDArray[np.bool_]:
    """Return which losses equal the worst case; none if that is infinite."""
    worst = worst_case_loss(joint_mechanism(runs), order, steps=runs[0].steps)
    if math.isinf(worst):
        return np.zeros(len(losses), dtype=np.bool_)
    return losses >= worst * _EQUAL
