"""Budgets of epochs from the privacy loss against one budget for all sets.

Both policies cost the same number of epochs. The budget of a set is proportional to the
time that ``Unlearner.plan``'s fit predicts from the runs of all other sets, so no set
helps to predict itself.

This is described and not judged. Harder sets gain and easier ones lose, so the mean
gain is much smaller than its spread over sets. Student's test on 20 sets found even a
strong simulated effect in one study of ten. With hundreds of sets the test would find
it, but also confirm a gain that is turned around by sets that are rare and far below.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.order import (
    idle,
    overshot_or_damaged,
    too_few_sets,
    too_little,
)
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import (
    DESCRIBED,
    NOT_TESTABLE,
    Verdict,
)
from opacus_pi.evaluation.intervals import mean_interval
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
    """Return the gap that a fixed budget leaves minus that of the own budget.

    Args:
        runs: The runs; only the judged sets.
        times: Epochs to unlearn, ``(seeds, sets)``; inf: never.

    Returns:
        ``(seeds, sets)``; above 0: the own budget leaves less.
    """
    gap, length = np.abs(runs.gaps), runs.num_epochs
    fixed = length / 2
    predicted = predicted_times(runs.difficulty, times, length) + 1e-9
    own = _scaled(predicted, fixed, length)
    epochs = np.arange(length + 1)
    return np.array(
        [
            [
                np.interp(fixed, epochs, path) - np.interp(spent, epochs, path)
                for spent, path in zip(own, paths, strict=True)
            ]
            for paths in gap
        ]
    )


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
    """Describe the gain of budgets from the loss; no test of it has any power.

    The first training and oracle choose the sets.
    """
    reason = runs.unusable() or too_little(runs)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    judged = runs.something_to_forget()
    some = runs.rest().only(judged)
    reason = too_few_sets(int(judged.sum())) or idle(some)
    reason = reason or overshot_or_damaged(runs.only(judged))
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    near = np.abs(some.to_go) <= some.least_gap
    times = np.where(near.any(2), near.argmax(2), np.inf)
    found = mean_interval(gains(some, times).mean(0))
    return Verdict(
        DESCRIBED,
        f"a mean gain over {judged.sum()} sets is too small to be tested",
        effect=Effect(
            "gap left by a fixed budget minus that left by budgets from the loss",
            *found,
            units=f"{judged.sum()} sets",
            trainings=len(times),
            digits=3,
        ),
    )
