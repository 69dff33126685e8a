"""The replication on another data set: what was expected of it, and what came out.

The expectations, and when one is met or refuted, are those of REPLICATION.md, which was
written before any model was trained on these data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.common.report import markdown
from benchmarks.reproduce.judging.order import FARTHER, SLOWER, slowness_by_choice
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    Verdict,
)

MET, REFUTED, OPEN, NOT_MET = "met", "refuted", "open", "not met"
_BOTH = ("UA", "MIA")
_HEAD = ("figure", "part", "main study", "expected", "replication", "expectation")
_TEXT = """## The replication

The settings, rates and rules above were fixed on Fashion-MNIST. So the main claims were
tested once more, on the glyphs of *notMNIST*: 7,804 training images, the same network
and settings. [A plan](../benchmarks/reproduce/REPLICATION.md), committed before any
model was trained on these images, says what was expected, and when an expectation is
met or refuted. It was run once, and nothing was left out.

{counted}

{table}

Nothing can be judged about speeds here. Most of these glyphs are so easy that only 4 or
5 of 20 sets start more than five points from their oracles, and at least 8 are needed.
These are the correlations for *slower* on the few sets, over all choices of them and by
every assumption. By MIA they speak for the paper's claim and against our expectation,
by UA for neither:

{speeds}

![replication](results/replication.png)

"""
Content = dict[str, Any]


@dataclass(frozen=True)
class Expectation:
    """What was expected of a part of a figure.

    Attributes:
        figure: Name of the figure.
        parts: The names that lead to each verdict that it is about.
        falling: A correlation below 0 and a verdict other than *borne out* were
            expected; False: *borne out*.
    """

    figure: str
    parts: tuple[tuple[str, ...], ...] = ((),)
    falling: bool = False


def _by_both(figure: str, claim: str) -> Expectation:
    return Expectation(figure, tuple((claim, m) for m in _BOTH), claim == SLOWER)


EXPECTED = (
    _by_both("fig1-middle", FARTHER),
    _by_both("fig1-middle", SLOWER),
    Expectation("fig2", (("high correlation",),)),
    Expectation("fig2", (("mean norm best",),)),
    Expectation("fig5", (("RA alike",), ("TA alike",))),
    _by_both("fig6", FARTHER),
    _by_both("fig6", SLOWER),
    Expectation("fig9"),
    Expectation("literal"),
)


def outcome(expected: Expectation, whole: Verdict) -> str:
    """Return whether an expectation is met, refuted, open or, else, not met.

    Args:
        expected: The expectation.
        whole: The verdict on its figure.
    """
    found = _verdicts(expected, whole)
    kinds = {one.verdict for one in found}
    leaves = [leaf for one in found for leaf in one.judged]
    values = [one.effect.estimate for one in leaves if one.effect]
    opposite = BORNE_OUT if expected.falling else NOT_BORNE_OUT
    sign = -1 if expected.falling else 1
    if opposite in kinds or any(sign * value < 0 for value in values):
        return REFUTED
    if NOT_TESTABLE in kinds:
        return OPEN
    return MET if expected.falling or kinds == {BORNE_OUT} else NOT_MET


def _verdicts(expected: Expectation, whole: Verdict) -> list[Verdict]:
    found = []
    for path in expected.parts:
        one = whole
        for name in path:
            one = one.parts[name]
        found.append(one)
    return found


def counted(second: dict[str, Content | None]) -> str:
    """Return how many expectations are met; empty if not all figures have been run.

    Args:
        second: The published content of each figure on the other data set.
    """
    found = [second[one.figure] for one in EXPECTED]
    verdicts = [Verdict.from_json(one) for one in found if one]
    if len(verdicts) < len(EXPECTED):
        return ""
    kinds = [outcome(*pair) for pair in zip(EXPECTED, verdicts, strict=True)]
    counts = ", ".join(
        f"{kinds.count(kind)} {kind}"
        for kind in (MET, REFUTED, OPEN, NOT_MET)
        if kind in kinds
    )
    return f"Of {len(kinds)} expectations: {counts}."


def replication_of(
    first: dict[str, Content | None], second: dict[str, Content | None]
) -> str:
    """Return the section on the replication, in Markdown; empty if it was not run.

    Args:
        first: The published content of each figure in the main study.
        second: That on the other data set.
    """
    counts = counted(second)
    if not counts or not all(first[one.figure] for one in EXPECTED):
        return ""
    rows = [list(_HEAD)]
    for one in EXPECTED:
        before, now = (
            Verdict.from_json(found[one.figure] or {}) for found in (first, second)
        )
        part = "; ".join(", ".join(path) for path in one.parts) or "whole claim"
        expected = "ρ below 0, not *borne out*" if one.falling else BORNE_OUT
        cells = _shown(one, before), expected, _shown(one, now), outcome(one, now)
        rows.append([one.figure, part, *cells])
    speeds = "\n".join(
        f"- {one.figure}: {speeds_of(second[one.figure] or {})}."
        for one in EXPECTED
        if one.falling
    )
    return _TEXT.format(counted=counts, table=markdown(rows), speeds=speeds)


def speeds_of(content: Content) -> str:
    """Return the correlations for *slower* on the few sets with something to forget.

    They are too few for a verdict. All choices of these sets are counted, by each
    account of what forgotten images share with others (see ``judging.order``).

    Args:
        content: The published content of a figure with UA and MIA.
    """
    said = []
    for metric in _BOTH:
        found = slowness_by_choice(Runs.of_panel(content["result"], metric), 2)
        low, high = min(map(min, found)), max(map(max, found))
        said.append(f"{low:.2f} to {high:.2f} by {metric}")
    return ", ".join(said)


def _shown(expected: Expectation, whole: Verdict) -> str:
    """Return verdicts and effects of the parts, the equal verdicts once."""
    found = _verdicts(expected, whole)
    kinds = "; ".join(dict.fromkeys(one.verdict for one in found))
    return ": ".join(filter(None, (kinds, "; ".join(_effects(found)))))


def _effects(found: list[Verdict]) -> Iterator[str]:
    """Yield the effect of each verdict; of one with parts the range of theirs."""
    for one in found:
        effects = [leaf.effect for leaf in one.judged if leaf.effect]
        if len(effects) == 1:
            yield effects[0].value()
        elif effects:
            values = [each.estimate for each in effects]
            yield f"{min(values):.2f} to {max(values):.2f}"
