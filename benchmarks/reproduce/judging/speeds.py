"""Further claims about the sets with something to forget: how fast are they unlearned?

Every training and every oracle chooses these sets in turn, as for *slower*.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.choices import by_every_choice
from benchmarks.reproduce.judging.contrasts import groups_differ, larger, shrinks
from benchmarks.reproduce.judging.order import (
    FEWEST_SETS,
    SLOWER,
    moved_too_much,
    overshot_or_damaged,
    slowness_of,
    speeds_unusable,
)
from benchmarks.reproduce.judging.runs import ACCOUNTS, SLOWNESS, Runs
from benchmarks.reproduce.judging.verdicts import NOT_TESTABLE, Verdict, agreed

Floats = NDArray[np.float64]


def judge_hardest(runs: Runs, order: Verdict) -> Verdict:
    """Decide whether the hardest quarter is slower than the others on average.

    Another quarter may still be the slowest, so the means of all are in the text.

    Args:
        runs: The runs.
        order: The verdict of ``judge_order`` on them.
    """
    if order.parts[SLOWER].verdict == NOT_TESTABLE:
        return Verdict(NOT_TESTABLE, "as for slower")
    return by_every_choice(_hardest_by_first, runs)


def _hardest_by_first(runs: Runs) -> Verdict:
    judged = runs.something_to_forget()
    reason = speeds_unusable(runs, judged)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    return agreed(map(_hardest_of, slowness_of(runs, judged)), ACCOUNTS)


def _hardest_of(scores: Floats) -> Verdict:
    """Compare the hardest quarter of the sets, the last ones, with the others."""
    number = max(4, scores.shape[1] // 4)
    assert scores.shape[1] >= FEWEST_SETS >= 2 * 4
    hardest, others = scores[:, -number:], scores[:, :-number]
    found = groups_differ(hardest, others, f"{SLOWNESS}, hardest quarter minus others")
    quarters = np.array_split(scores.mean(0), 4)
    means = ", ".join(f"{one.mean():.2f}" for one in quarters)
    text = f"from the easiest to the hardest quarter the means are {means}"
    return replace(found, remarks=(*found.remarks, text))


def judge_shrinking(small: Runs, large: Runs) -> Verdict:
    """Decide whether speeds separate less for large sets than for small ones.

    The halves are those of the positions in the ranking at which the sets of both sizes
    have something to forget. Larger sets open larger gaps, so that more of their easy
    sets would be judged otherwise, and halves of different difficulty compared.

    Args:
        small: The runs on the smallest sets, easiest first.
        large: The runs on as many of the largest sets, with the same trainings.
    """
    same = small.gaps.shape[:2] == large.gaps.shape[:2]
    if not same or len(small.oracles) != len(large.oracles):
        reason = "the sizes have other numbers of sets, trainings or oracles"
        return Verdict(NOT_TESTABLE, reason)
    return by_every_choice(_shrinking_by_first, small, large)


def _shrinking_by_first(small: Runs, large: Runs) -> Verdict:
    both = small, large
    judged = small.something_to_forget() & large.something_to_forget()
    for runs in both:
        reason = speeds_unusable(runs, judged)
        if reason:
            return Verdict(NOT_TESTABLE, f"positions of both sizes: {reason}")
    pairs = zip(*(slowness_of(one, judged) for one in both), strict=True)
    return agreed((shrinks(*pair, SLOWNESS) for pair in pairs), ACCOUNTS)


def judge_approach(runs: Runs) -> Verdict:
    """Decide whether the gap shrinks on the sets with something to forget."""
    reason = runs.unusable()
    return (
        Verdict(NOT_TESTABLE, reason)
        if reason
        else by_every_choice(_approach_by_first, runs)
    )


def _approach_by_first(runs: Runs) -> Verdict:
    judged = runs.something_to_forget()
    if not judged.any():
        return Verdict(NOT_TESTABLE, "no set has something to forget")
    measured = runs.rest().only(judged)
    reason = moved_too_much(measured) or overshot_or_damaged(runs.only(judged))
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    return agreed(map(_closer, measured.accounts()), ACCOUNTS)


def _closer(runs: Runs) -> Verdict:
    """Decide whether the gaps are smaller after the run than before it."""
    before, after = (np.abs(runs.to_go[:, :, when]) for when in (0, -1))
    return larger(before, after, "share of the gap before the run that was closed")
