"""Do harder forget sets take longer to unlearn? The statistics, fixed beforehand.

**Primary statistic.** The area under the gap: the distance of a metric from the mean
oracle, summed over the run (points × epochs). It is averaged over the seeds of a set,
and its rank correlation with the difficulty of the sets is tested by permuting sets.

**Beside it, not counted.** *Farther*: the same test for the gap before unlearning.
*Slower*: the same test for the area divided by this gap and by the length of the run,
the share of the gap that remained on average. A harder set can take longer because it
has farther to go, because it is slower, or both.

**When a claim is judged at all.** On sets whose gap exceeds five points before
unlearning; at least eight of them; if the method closed a part of the gap on these sets
(at least a tenth, and more than varies between sets); and if test accuracy ends at most
five points below the oracles'. Otherwise the claim is *not testable yet*, with the
reason. A run in which nothing was unlearned says nothing about times.

**Verdict.** Borne out if at most 2.5 % of the orders of the sets correlate as highly.
Not borne out if at most 2.5 % correlate as lowly, or if the interval of the correlation
lies below 0.5, the smallest correlation that we count as confirming such a claim. Else
undecided.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.reproduce.judging.ranks import RankTest, rank_test
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    combined,
    text_of,
    with_remark,
)
from opacus_pi.evaluation import GapSummary, UnlearningTrace, gap_summary
from opacus_pi.evaluation.intervals import mean_interval

FEWEST_SETS = 8
LEAST_GAP = 0.05  # gap before unlearning from which on there is something to forget
LEAST_CLOSED = 0.1  # share of the gap from which on something was unlearned
MOST_LOST = 0.05  # test accuracy that a method may cost
LEAST_RHO = 0.5  # smallest correlation that confirms a claim about an order
LEVEL = 0.025  # of each of the two one-sided tests
_METRIC = "gap"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """The runs of one method and one metric on several forget sets.

    Attributes:
        difficulty: Mean privacy loss of each set, ``(sets,)``.
        gaps: Metric minus the mean oracle's, ``(seeds, sets, epochs + 1)``; the first
            value is before unlearning.
        lost: Test accuracy of the mean oracle minus that after the run,
            ``(seeds, sets)``.
        least_gap: Gap before unlearning that a set must exceed to be judged, a number
            or one for each set; five points if the metric is an accuracy.
    """

    difficulty: Floats
    gaps: Floats
    lost: Floats
    least_gap: float | Floats = LEAST_GAP

    @staticmethod
    def of_panel(panel: dict[str, Any], metric: str) -> "Runs":
        """Return the runs of one metric of a figure's panel."""
        return Runs(
            np.array(panel["mean_losses"]),
            np.array(panel["gaps"][metric]),
            np.array(panel["lost"]),
        )

    def summaries(self) -> list[list[GapSummary]]:
        """Return the summary of each run, ``[seed][set]``."""
        times = list(range(self.gaps.shape[2]))
        return [
            [
                gap_summary(
                    UnlearningTrace(times, {_METRIC: path}), 0.0, metric=_METRIC
                )
                for path in row
            ]
            for row in self.gaps
        ]

    def of_sets(self) -> dict[str, Floats]:
        """Return initial gap, area, share that remained and share closed by set.

        Shares are ratios of means over the seeds, so that a seed with a small gap does
        not dominate.
        """
        gap = np.abs(self.gaps).mean(0)
        area = (gap[:, 1:] + gap[:, :-1]).sum(1) / 2
        initial, final = gap[:, 0], gap[:, -1]
        safe = np.where(initial > 0, initial, np.nan)
        return {
            "initial": initial,
            "area": area,
            "remaining": area / safe / (gap.shape[1] - 1),
            "closed": 1 - final / safe,
        }


def judge_order(runs: Runs) -> Verdict:
    """Decide whether harder sets take longer, by the area under the gap."""
    sets = runs.of_sets()
    judged = sets["initial"] > runs.least_gap
    beside = _remarks(runs, sets, judged)
    reason = _not_testable(runs, sets, judged)
    if reason:
        return _with_remarks(Verdict(NOT_TESTABLE, reason), beside)
    found = rank_test(runs.difficulty[judged], sets["area"][judged])
    because = f"area under the gap: {found.text()}"
    return _with_remarks(Verdict(verdict_of(found), because), beside)


def verdict_of(found: RankTest) -> str:
    """Return the verdict on "rises with difficulty"."""
    if found.p_rising <= LEVEL:
        return BORNE_OUT
    if found.p_falling <= LEVEL or found.high < LEAST_RHO:
        return NOT_BORNE_OUT
    return UNDECIDED


def too_few_sets(number: int) -> str:
    """Return why this many sets cannot be judged; empty if they can."""
    if number >= FEWEST_SETS:
        return ""
    return (
        f"the unit of the test is the forget set, and there are {number}; at least "
        f"{FEWEST_SETS} are needed"
    )


def rising(difficulty: ArrayLike, values: ArrayLike) -> Verdict:
    """Decide whether values, ``(seeds, sets)``, rise with the difficulty of the set."""
    means = np.asarray(values, dtype=np.float64).mean(0)
    reason = too_few_sets(len(means))
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    found = rank_test(difficulty, means)
    return Verdict(verdict_of(found), found.text())


def judge_panel(panel: dict[str, Any]) -> Verdict:
    """Decide whether harder sets take longer, by every metric of a panel."""
    return combined({m: judge_order(Runs.of_panel(panel, m)) for m in panel["gaps"]})


def judge_panels(panels: dict[str, Any]) -> Verdict:
    """Decide whether harder sets take longer in every panel."""
    if not panels:
        return Verdict(NOT_TESTABLE, "this scale has no such runs")
    return combined({name: judge_panel(one) for name, one in panels.items()})


def _not_testable(
    runs: Runs, sets: dict[str, Floats], judged: NDArray[np.bool_]
) -> str:
    """Return why the order cannot be judged; empty if it can."""
    few = too_few_sets(len(judged))
    if few:
        return few
    if judged.sum() < FEWEST_SETS:
        return (
            f"{judged.sum()} of {len(judged)} sets have something to forget (a gap of "
            f"more than five points before unlearning); at least {FEWEST_SETS} are "
            "needed"
        )
    return _idle_or_damaged(runs, sets, judged)


def cannot_compare(runs: Runs) -> str:
    """Return why sets of one difficulty cannot be compared; empty if they can."""
    sets = runs.of_sets()
    judged = sets["initial"] > runs.least_gap
    if not judged.all():
        return (
            f"{judged.sum()} of {len(judged)} sets of a score have something to forget "
            "(a gap of more than five points before unlearning)"
        )
    return _idle_or_damaged(runs, sets, judged)


def _idle_or_damaged(
    runs: Runs, sets: dict[str, Floats], judged: NDArray[np.bool_]
) -> str:
    """Say if nothing was unlearned, or only at the cost of the model; else empty."""
    closed = mean_interval(sets["closed"][judged])
    if closed.low <= 0 or closed.estimate < LEAST_CLOSED:
        return (
            "nothing was unlearned on the sets with something to forget: share of the "
            f"gap closed {text_of(closed, 2)}"
        )
    lost = float(runs.lost[:, judged].mean())
    if lost > MOST_LOST:
        return (
            "the gap was closed by damaging the model: test accuracy ends "
            f"{100 * lost:.0f} points below the oracles'"
        )
    return ""


def _remarks(
    runs: Runs, sets: dict[str, Floats], judged: NDArray[np.bool_]
) -> dict[str, str]:
    """Return what is shown beside the primary statistic."""
    found = {"farther, gap before unlearning": _rank_text(runs, sets["initial"])}
    if judged.sum() >= 3:
        some = Runs(runs.difficulty[judged], runs.gaps[:, judged], runs.lost)
        found["slower, share of the gap that remained"] = _rank_text(
            some, sets["remaining"][judged]
        )
    return found | {"runs on sets with something to forget": arrival(runs, judged)}


def _rank_text(runs: Runs, values: Floats) -> str:
    if len(values) < 3:
        return f"only {len(values)} sets"
    return rank_test(runs.difficulty, values).text()


def arrivals(runs: Runs, judged: NDArray[np.bool_]) -> dict[str, float]:
    """Return shares of the runs on some sets.

    ``first``: came within five points at some time. ``there``: ended there.
    ``kept``: ended there with a test accuracy of at most five points below the
    oracles'. ``overshot``: ended more than five points beyond the oracles.
    """
    found = [
        (one, lost <= MOST_LOST)
        for row, losts in zip(runs.summaries(), runs.lost, strict=True)
        for one, lost, use in zip(row, losts, judged, strict=True)
        if use
    ]
    there = np.array([np.isfinite(one.settled_time) for one, _ in found])
    kept = np.array([fine for _, fine in found])
    return {
        "first": float(np.mean([np.isfinite(one.first_time) for one, _ in found])),
        "there": float(there.mean()),
        "kept": float((there & kept).mean()),
        "overshot": float(np.mean([one.overshot for one, _ in found])),
    }


def arrival(runs: Runs, judged: NDArray[np.bool_]) -> str:
    """Describe the runs on sets with something to forget."""
    if not judged.any():
        return "no set starts more than five points from its oracles"
    share = {k: f"{100 * v:.0f} %" for k, v in arrivals(runs, judged).items()}
    closed = 100 * runs.of_sets()["closed"][judged].mean()
    return (
        f"{share['first']} came within five points, {share['there']} ended there, "
        f"{share['kept']} ended there at kept accuracy, {share['overshot']} overshot; "
        f"closed {closed:.0f} % of the gap; test accuracy "
        f"{100 * runs.lost[:, judged].mean():.1f} points below the oracles'"
    )


def _with_remarks(verdict: Verdict, remarks: dict[str, str]) -> Verdict:
    for name, text in remarks.items():
        verdict = with_remark(verdict, name, text)
    return verdict
