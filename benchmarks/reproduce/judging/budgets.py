"""Budgets of epochs from the privacy loss against one budget for all sets.

Both policies cost the same number of epochs. The budget of a set is proportional to the
time that ``Unlearner.plan``'s fit predicts from the runs of all other sets, so no set
helps to predict itself.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.contrasts import positive
from benchmarks.reproduce.judging.order import cannot_compare, too_few_sets
from benchmarks.reproduce.judging.runs import LEAST_GAP, Runs
from benchmarks.reproduce.judging.verdicts import NOT_TESTABLE, Verdict
from opacus_pi.unlearning.plan import predict_time

Floats = NDArray[np.float64]


def predicted_times(losses: Floats, times: Floats, length: float) -> Floats:
    """Return the predicted time of each set from the runs of all others.

    Args:
        losses: Mean privacy loss of each set, ``(sets,)``.
        times: Epochs to unlearn, ``(seeds, sets)``; inf: never.
        length: Epochs of a run, used in place of never.
    """
    found = []
    for own, loss in enumerate(losses):
        past = np.delete(times, own, axis=1)
        known = np.tile(np.delete(losses, own), len(past))
        time = predict_time(loss, known, past.ravel(), past_lengths=length)
        found.append(length if time is None else time)
    return np.clip(found, 0, length)


def gains(runs: Runs, times: Floats) -> Floats:
    """Return the gap that a fixed budget leaves minus that of the own budget, by set.

    Args:
        runs: The runs; only the judged sets.
        times: Epochs to unlearn, ``(seeds, sets)``; inf: never.

    Returns:
        ``(sets,)``; above 0: the own budget leaves less.
    """
    gap = np.abs(runs.gaps).mean(0)
    length = gap.shape[1] - 1
    fixed = length / 2
    predicted = predicted_times(runs.difficulty, times, length) + 1e-9
    own = _scaled(predicted, fixed, length)
    epochs = np.arange(length + 1)
    left = [np.interp(spent, epochs, row) for spent, row in zip(own, gap, strict=True)]
    return np.array([np.interp(fixed, epochs, row) for row in gap]) - left


def _scaled(predicted: Floats, mean: float, most: float) -> Floats:
    """Return budgets of this mean, proportional to predictions, at most ``most``."""
    low, high = 0.0, most * len(predicted) / predicted.min()
    for _ in range(100):
        middle = (low + high) / 2
        if np.minimum(middle * predicted, most).mean() < mean:
            low = middle
        else:
            high = middle
    return np.minimum(high * predicted, most)


def judge_gain(runs: Runs) -> Verdict:
    """Decide whether budgets from the loss leave less of the gap at equal cost."""
    judged = runs.of_sets()["initial"] > LEAST_GAP
    reason = too_few_sets(int(judged.sum()))
    if reason:
        return Verdict(NOT_TESTABLE, f"sets with something to forget: {reason}")
    some = runs.only(judged)
    reason = cannot_compare(some)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    times = np.array([[one.first_time for one in row] for row in some.summaries()])
    what = "gap left by a fixed budget minus that of budgets from the loss"
    return positive(gains(some, times)[None], what)
