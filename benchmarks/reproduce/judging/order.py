"""Are harder forget sets farther from their oracles, and slower to unlearn?

These are two claims. A harder set can take longer because it has *farther* to go, or
because it is *slower*: a smaller share of its distance is closed in an epoch. The area
under the gap, or the time until a threshold, cannot tell one from the other. Everything
below was decided before the runs of the main study.

**Farther.** Statistic: the gap before unlearning, signed, on all sets. Judged if there
is something to forget: the harder half of the sets starts more than five points from
the oracles on average. The claim does not depend on the method.

**Slower.** Statistic: the share of the gap that remained, on average over the run (the
area under the signed gap, divided by the gap before unlearning and by the epochs). The
movement of the metric on retained images is subtracted from the gap first: a loss of
accuracy on all images is no unlearning. The verdict must be the same without this, and
by UA also if forgotten images make as many more errors as test images do
(``Runs.accounts``). Judged on the sets with something to forget, a
gap of more than five points in one training by one oracle; they are then measured with
the other trainings and oracles, and every training and oracle chooses in turn
(``choices``). At least eight such sets are needed, and

* at least eight epochs: with fewer, too little is closed to compare (if 3 % is closed
  in an epoch, simulations find sets that are 4.5 times slower in none of the studies
  with four epochs, in 22 % with six, and in 85 % with eight);
* something unlearned: at least 20 % of the gap in total, and more than varies between
  sets, and between trainings;
* at most 50 % of the gap closed in the first epoch, or all sets look alike;
* a metric on retained images that moved by at most five points, on average over the
  runs;
* no set that went more than five points beyond its oracles at any epoch, on average
  over the trainings;
* no run on these sets that ended more than five points of test accuracy below the
  oracles.

**Both** need at least three oracles for each set, five trainings (with fewer, a kind of
training that is not rare is often not drawn), eight sets, and finite numbers. Otherwise
the claim is *not testable yet*, with the reason.

**Verdict.** By the test of ``ranks``, over sets and trainings. The claim is that the
correlation is above 0. Borne out if chance correlates as highly in at most 2.5 %, not
borne out if it correlates as lowly in at most 2.5 %, else undecided.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.reproduce.judging.choices import by_every_choice, choices
from benchmarks.reproduce.judging.ranks import (
    RankTest,
    rank_correlation,
    rank_test,
    student_quantile,
)
from benchmarks.reproduce.judging.runs import (
    ACCOUNTS,
    MOST_LOST,
    MOST_MOVED,
    SHORTLY,
    Runs,
)
from benchmarks.reproduce.judging.verdicts import (
    NOT_TESTABLE,
    Verdict,
    agreed,
    combined,
    of_tests,
    text_of,
)
from opacus_pi.evaluation.intervals import mean_interval

FEWEST_SETS = 8
FEWEST_TRAININGS = 5
FEWEST_ORACLES = 3
FEWEST_EPOCHS = 8
LEAST_CLOSED = 0.2  # share of the gap from which on something was unlearned
MOST_AT_ONCE = 0.5  # share of the gap that the first epoch may close
FARTHER, SLOWER = "farther", "slower"
_REMAINED = "the share of the gap that remained"

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def judge_order(runs: Runs) -> Verdict:
    """Decide whether harder sets are farther, and whether they are slower."""
    return combined({FARTHER: judge_farther(runs), SLOWER: judge_slower(runs)})


def judge_farther(runs: Runs) -> Verdict:
    """Decide whether the gap before unlearning rises with the difficulty of the set."""
    reason = runs.unusable() or too_little(runs) or _nothing_to_forget(runs)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    found = rank_test(runs.difficulty, runs.to_go[:, :, 0])
    return verdict_of(found, "the gap before unlearning")


def judge_slower(runs: Runs) -> Verdict:
    """Decide whether more of the gap remained, on average, on harder sets."""
    reason = runs.unusable() or too_little(runs) or _too_short(runs)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    found = by_every_choice(slower_by_first, runs)
    if not found.effect:
        return found
    return replace(found, remarks=(*found.remarks, _by_account(runs)))


def _by_account(runs: Runs) -> str:
    """Return the correlations by each account of what is shared, over all choices."""
    rows = slowness_by_choice(runs, FEWEST_SETS)
    ends = zip(SHORTLY, np.min(rows, 0), np.max(rows, 0), strict=False)
    said = "; ".join(f"{case} {low:.2f} to {high:.2f}" for case, low, high in ends)
    return f"correlations of all choices: {said}"


def slowness_by_choice(runs: Runs, fewest_sets: int) -> list[list[float]]:
    """Return correlations of difficulty and slowness, ``[choice][account]``.

    Choices of fewer sets are left out.
    """
    rows = []
    for (some,) in choices(runs):
        judged = some.something_to_forget()
        if judged.sum() >= fewest_sets:
            x, scores = runs.difficulty[judged], slowness_of(some, judged)
            rows.append([rank_correlation(x, one) for one in scores])
    return rows


def slower_by_first(runs: Runs) -> Verdict:
    """Decide about *slower* if the first training and oracle choose the sets."""
    judged = runs.something_to_forget()
    reason = speeds_unusable(runs, judged)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    difficulty = runs.difficulty[judged]
    found = (rank_test(difficulty, one) for one in slowness_of(runs, judged))
    return agreed((verdict_of(one, _REMAINED) for one in found), ACCOUNTS)


def slowness_of(runs: Runs, judged: Bools) -> list[Floats]:
    """Return the slowness of chosen sets by each account of what they share.

    It is measured in all trainings, and by all oracles, but the first.
    """
    return [one.slowness() for one in runs.rest().only(judged).accounts()]


def speeds_unusable(runs: Runs, judged: Bools) -> str:
    """Return why the speeds of chosen sets cannot be judged; empty if they can."""
    if judged.sum() < FEWEST_SETS:
        return _few_judged(judged)
    measured = runs.rest().only(judged)
    reason = moved_too_much(measured) or idle(measured.unlearned())
    reason = reason or _at_once(measured.unlearned())
    return reason or overshot_or_damaged(runs.only(judged))


def verdict_of(found: RankTest, what: str) -> Verdict:
    """Return the verdict on "rises with difficulty".

    Args:
        found: The correlation.
        what: What difficulty is correlated with, as a noun phrase.
    """
    effect = found.effect(f"correlation of difficulty with {what}")
    return of_tests(found.p_rising, found.p_falling, effect)


def too_few_sets(number: int) -> str:
    """Return why this many sets cannot be judged; empty if they can."""
    if number >= FEWEST_SETS:
        return ""
    return (
        f"the unit of the test is the forget set, and there are {number}; at least "
        f"{FEWEST_SETS} are needed"
    )


def rising(
    difficulty: ArrayLike, values: ArrayLike, what: str = "the values"
) -> Verdict:
    """Decide whether values, ``(trainings, sets)``, rise with the difficulty.

    ``what`` names the values.
    """
    x, rows = np.asarray(difficulty, np.float64), np.asarray(values, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(rows).all()):
        return Verdict(NOT_TESTABLE, "some values are NaN or infinite")
    reason = too_few_sets(len(x)) or _too_few("trainings", len(rows), FEWEST_TRAININGS)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    return verdict_of(rank_test(x, rows), what)


def judge_panel(panel: dict[str, Any]) -> Verdict:
    """Decide on both claims, by every metric of a panel."""
    return by_claim(orders_of(panel))


def orders_of(panel: dict[str, Any]) -> dict[str, Verdict]:
    """Return the verdict by each metric of a panel."""
    return {m: judge_order(Runs.of_panel(panel, m)) for m in panel["gaps"]}


def judge_panels(panels: dict[str, Any]) -> Verdict:
    """Decide on both claims in every panel."""
    if not panels:
        return Verdict(NOT_TESTABLE, "this scale has no such runs")
    return by_claim({name: judge_panel(one) for name, one in panels.items()})


def by_claim(found: dict[str, Verdict]) -> Verdict:
    """Return one verdict on *farther* and one on *slower* from those of several parts.

    Args:
        found: For each part the verdict of ``judge_order``, or one of this function.
    """
    claims = {
        claim: combined({name: one.parts[claim] for name, one in found.items()})
        for claim in (FARTHER, SLOWER)
    }
    return combined(claims)


def too_little(runs: Runs) -> str:
    """Return which number of sets, trainings or oracles is too small; else empty."""
    trainings, number = runs.lost.shape
    return (
        too_few_sets(number)
        or _too_few("trainings", trainings, FEWEST_TRAININGS)
        or _too_few("oracles of each set", len(runs.oracles), FEWEST_ORACLES)
    )


def _too_few(what: str, number: int, fewest: int) -> str:
    return "" if number >= fewest else f"{number} {what}; at least {fewest} are needed"


def _too_short(runs: Runs) -> str:
    return _too_few("epochs of unlearning", runs.num_epochs, FEWEST_EPOCHS)


def _nothing_to_forget(runs: Runs) -> str:
    hard = runs.difficulty >= np.median(runs.difficulty)
    gap = float(runs.to_go[:, hard, 0].mean())
    if gap > np.mean(np.broadcast_to(runs.least_gap, hard.shape)[hard]):
        return ""
    return (
        "nothing to forget: the harder half of the sets starts "
        f"{gap:.3f} from the oracles; more than five points are needed"
    )


def _few_judged(judged: Bools) -> str:
    return (
        f"{judged.sum()} of {len(judged)} sets have something to forget (a gap of more "
        "than five points before unlearning, in the training and by the oracle that "
        f"choose); at least {FEWEST_SETS} are needed"
    )


def overshot_or_damaged(runs: Runs) -> str:
    """Return on how many sets runs went too far, or cost too much; else empty."""
    return _beyond(runs) or _damaged(runs)


def idle(runs: Runs) -> str:
    """Return why runs count as having unlearned nothing; empty if they did."""
    to_go = runs.to_go
    closed = to_go[:, :, 0] - to_go[:, :, -1]  # the oracles cancel
    share = float(closed.mean() / to_go[:, :, 0].mean())
    surely = all(_surely_above_0(closed.mean(axis)) for axis in (0, 1))
    if surely and share >= LEAST_CLOSED:
        return ""
    over_sets, over_trainings = (mean_interval(closed.mean(axis)) for axis in (0, 1))
    return (
        "too little was unlearned on the sets with something to forget: without the "
        f"movement of retained images the gap shrinks by {text_of(over_sets)} over "
        f"sets, {text_of(over_trainings)} over trainings, {100 * share:.0f} % of it; "
        f"at least {100 * LEAST_CLOSED:.0f} % are needed"
    )


def _surely_above_0(values: Floats) -> bool:
    """Return whether Student's 95 % interval of a mean is above 0."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return bool(values.mean() > student_quantile(len(values) - 1) * error)


def moved_too_much(runs: Runs) -> str:
    """Return by how much the metric moved on retained images, if it is too much."""
    mean = float(np.abs(runs.moved[:, :, 1:]).mean())
    if mean <= MOST_MOVED:
        return ""
    return (
        f"the measure moved by {mean:.3f} on retained images, on average over the "
        "runs; beyond five points the movement of the forget set cannot be told from it"
    )


def _at_once(runs: Runs) -> str:
    to_go = runs.to_go.mean((0, 1))
    share = float(1 - to_go[1] / to_go[0])
    if share <= MOST_AT_ONCE:
        return ""
    return (
        f"{100 * share:.0f} % of the gap were closed in the first epoch: evaluate more "
        f"often; at most {100 * MOST_AT_ONCE:.0f} % can be judged"
    )


def _beyond(runs: Runs) -> str:
    lowest = runs.to_go.mean(0).min(1)
    number = int((lowest < -np.asarray(runs.least_gap)).sum())
    if not number:
        return ""
    return (
        f"overshot: {number} of {len(lowest)} sets went more than five points beyond "
        "their oracles"
    )


def _damaged(runs: Runs) -> str:
    worst = runs.lost.max(0)
    number = int((worst > MOST_LOST).sum())
    if not number:
        return ""
    return (
        f"damaged: on {number} of {len(worst)} sets a run ended more than five points "
        f"of test accuracy below the oracles ({100 * worst.max():.0f} points at most)"
    )


def cannot_compare(runs: Runs) -> str:
    """Return why sets of one difficulty cannot be compared; empty if they can."""
    reason = runs.unusable()
    if reason:
        return reason
    judged = runs.of_sets()["initial"] > runs.least_gap
    if not judged.all():
        return (
            f"{judged.sum()} of {len(judged)} sets of a score have something to forget "
            "(a gap of more than five points before unlearning)"
        )
    return moved_too_much(runs) or idle(runs.unlearned()) or overshot_or_damaged(runs)


def arrivals(runs: Runs, judged: Bools) -> dict[str, float]:
    """Return shares of the runs on some sets.

    ``first``: came within five points at some time. ``there``: ended there.
    ``kept``: ended there with a test accuracy of at most five points below the
    oracles'. ``overshot``: ended more than five points beyond the oracles.
    """
    some = runs.only(judged)
    to_go, least = some.to_go, np.asarray(some.least_gap)
    end = to_go[:, :, -1]
    near = np.abs(to_go) <= (least if least.ndim == 0 else least[:, None])
    there, kept = np.abs(end) <= least, some.lost <= MOST_LOST
    return {
        "first": float(near.any(2).mean()),
        "there": float(there.mean()),
        "kept": float((there & kept).mean()),
        "overshot": float((end < -least).mean()),
    }


def beside_oracles(lost: float) -> str:
    """Return in words by how much test accuracy is below or above the oracles'."""
    points = f"{100 * abs(lost):.1f}"
    side = "below" if lost > 0 else "above"
    return (
        f"{points} points {side} the oracles'" if float(points) else "at the oracles'"
    )
