"""Cheap difficulty scores: reductions of the ledger that need no privacy accounting.

Every function takes the ledger of a run (or the ledgers of several independent runs,
whose scores are averaged) and returns one float64 score per example with the same
sense as the privacy loss: **higher is harder**. An example that was never observed gets
the highest score that the quantity allows, never a low one.

>>> from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, NoisySGD
>>> mechanism = NoisySGD(num_steps=4, sample_rate=0.5, noise_std=1.0)
>>> ledger = GradNormLedger(
...     mechanism, steps=[2, 4], grad_norms=[[3, 1], [1, 0]], confidences=[[0, 1]] * 2
... )
>>> grad_norm_mid(ledger), grad_norm_end(ledger), grad_norm_mean(ledger)
(array([3., 1.]), array([1., 0.]), array([2. , 0.5]))
>>> c_proxy(ledger)
array([1., 0.])
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect
from opacus_pi.ledger.gap_filling import fill_unobserved
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of

__all__ = [
    "c_proxy",
    "el2n",
    "forgetting_events",
    "grad_norm_end",
    "grad_norm_mean",
    "grad_norm_mid",
]

Scores = NDArray[np.float64]
Ledgers = GradNormLedger | Sequence[GradNormLedger]


def grad_norm_mid(ledger: Ledgers) -> Scores:
    """Return the gradient norm at mid-training, the row nearest to half of the updates.

    Args:
        ledger: The ledger of one run, or of several independent runs.

    Returns:
        float64 ``(n,)``; higher is harder.

    Raises:
        ValueError: If the ledger has no row.

    Source: paper, Section 5.3, proxy (1).
    """
    return _over_runs(ledger, lambda run: _norms(run)[_mid(run)])


def grad_norm_end(ledger: Ledgers) -> Scores:
    """Return the gradient norm at the last row.

    Args:
        ledger: The ledger of one run, or of several independent runs.

    Returns:
        float64 ``(n,)``; higher is harder.

    Raises:
        ValueError: If the ledger has no row.

    Source: paper, Section 5.3, proxy (2).
    """
    return _over_runs(ledger, lambda run: _norms(run)[-1])


def grad_norm_mean(ledger: Ledgers) -> Scores:
    """Return the gradient norm averaged over all rows, each with the same weight.

    Args:
        ledger: The ledger of one run, or of several independent runs.

    Returns:
        float64 ``(n,)``; higher is harder.

    Raises:
        ValueError: If the ledger has no row.

    Source: paper, Section 5.3, proxy (3), with a row at every epoch.
    """
    return _over_runs(ledger, lambda run: _norms(run).mean(axis=0))


def c_proxy(ledger: Ledgers) -> Scores:
    """Return one minus the confidence (softmax at the label) averaged over all rows.

    The published C-Proxy is the mean confidence, for which *low* means hard to learn
    and easily memorised. It is subtracted from one to have the same sense as the other
    scores.

    Args:
        ledger: The ledger of one run, or of several; it must contain ``confidences``.

    Returns:
        float64 ``(n,)`` in [0, 1]; higher is harder.

    Raises:
        ValueError: If the ledger has no row or no confidences.

    Source: paper, Section 5.3, proxy (4); Zhao et al. 2024; Jiang et al. 2020
    (arXiv:2002.03206).
    """
    return _over_runs(
        ledger, lambda run: 1 - _filled(run, "confidences", 0.0).mean(axis=0)
    )


def el2n(ledger: Ledgers) -> Scores:
    """Return the norm of (softmax - one-hot label) at mid-training, the EL2N score.

    Several ledgers give the average over trajectories, as in the original.

    Args:
        ledger: The ledger of one run, or of several; it must contain ``errors``.

    Returns:
        float64 ``(n,)`` in [0, √2]; higher is harder.

    Raises:
        ValueError: If the ledger has no row or no errors.

    Source: paper, Section 5.3, proxy (5); Paul et al. 2021 (arXiv:2107.07075).
    """
    return _over_runs(
        ledger, lambda run: _filled(run, "errors", np.sqrt(2.0))[_mid(run)]
    )


def forgetting_events(ledger: Ledgers) -> Scores:
    """Return how often an example changed from correct to wrong between rows.

    An example that was correct at no row was never learned: its score is infinite, as
    in the original.

    Args:
        ledger: The ledger of one run, or of several; it must contain ``correct``.

    Returns:
        float64 ``(n,)``, whole numbers or infinity for one run; higher is harder.

    Raises:
        ValueError: If the ledger has no row or no ``correct``.

    Source: Toneva et al. 2019 (arXiv:1812.05159), Section 3.
    """

    def events(run: GradNormLedger) -> Scores:
        right = _filled(run, "correct", 0.0) > 0.5
        forgotten = (right[:-1] & ~right[1:]).sum(axis=0)
        return np.where(right.any(axis=0), forgotten, np.inf)

    return _over_runs(ledger, events)


def _over_runs(ledger: Ledgers, score: Callable[[GradNormLedger], Scores]) -> Scores:
    """Return the mean of a score over independent runs.

    Args:
        ledger: One run or several.
        score: From the ledger of one run to one number per example, ``(n,)``.

    Raises:
        ValueError: If the ledger has no row.
    """
    runs = runs_of(ledger)
    expect(
        runs[0].num_rows > 0,
        "ledger",
        "a ledger without rows",
        "must have a row",
        "Record at least once during training.",
    )
    mean: NDArray[np.float64] = np.mean([score(run) for run in runs], axis=0)
    return mean


def _mid(run: GradNormLedger) -> int:
    """Return the row nearest to half of the updates (the earlier of two as near)."""
    return int(np.argmin(np.abs(2 * run.steps - run.mechanism.num_steps)))


def _norms(run: GradNormLedger) -> Scores:
    """Return gradient norms ``(N, n)``; for an example never seen, the clip norm.

    The clip norm is the largest norm that counts in an update. Without clipping there
    is no such number, and the score of an example that was never seen is infinite.

    Args:
        run: The ledger of one run.
    """
    norms = fill_unobserved(run.grad_norms)
    clip = np.reshape(run.mechanism.max_grad_norm, (-1, 1))
    return np.where(np.isinf(norms), clip, norms)


def _filled(run: GradNormLedger, name: str, hardest: float) -> Scores:
    """Return a quantity ``(N, n)``; for an example never seen, the hardest value.

    The score must not call an example easy only because it was never drawn.

    Args:
        run: The ledger of one run.
        name: The column: ``confidences``, ``errors`` or ``correct``.
        hardest: The value of the hardest example.

    Raises:
        ValueError: If the ledger lacks the column.
    """
    rows = getattr(run, name)
    expect(
        rows is not None,
        "ledger",
        f"a ledger without {name}",
        f"must contain {name}",
        "Record the training of a classifier with Recorder('swept', criterion=...), "
        f"which measures {name} too, or use a score of gradient norms, such as "
        "grad_norm_mean.",
    )
    filled = fill_unobserved(rows)
    return np.where(np.isinf(filled), hardest, filled)
