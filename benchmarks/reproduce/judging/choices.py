"""Judge with every training and every oracle as those that choose the sets.

Sets with something to forget are chosen by one training and one oracle, and measured
with the others (see ``runs``). Which training is the first one is a label. In simulated
studies with many sets near five points the verdict depended on it in more than half of
them. So a judge is asked once for each pair of a training and an oracle, and a verdict
stands only if two thirds of the pairs give it. If each single verdict is wrong in 2.5 %
of the studies, two thirds of them are in at most 3.75 % (Markov's inequality).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
)

MOST_OF = 2 / 3  # share of the choices that must agree
_CHOICES = "choices of the training and the oracle that select the sets"


def choices(*runs: Runs) -> Iterator[tuple[Runs, ...]]:
    """Yield the runs with each training and each oracle as the first one.

    Args:
        runs: Runs of the same trainings, with as many oracles.
    """
    first = runs[0]
    for seed in range(len(first.lost)):
        for oracle in range(len(first.oracles)):
            yield tuple(_with_first(one, seed, oracle) for one in runs)


def _with_first(runs: Runs, seed: int, oracle: int) -> Runs:
    """Return runs in which this training and this oracle come first."""
    trainings = _moved_up(len(runs.lost), seed)
    oracles = runs.oracles[_moved_up(len(runs.oracles), oracle)]
    return replace(
        runs,
        gaps=runs.gaps[trainings],
        lost=runs.lost[trainings],
        moved=runs.moved[trainings],
        oracles=oracles[:, trainings] if oracles.ndim == 3 else oracles,
    )


def _moved_up(number: int, first: int) -> list[int]:
    return [first, *(one for one in range(number) if one != first)]


def by_every_choice(judge: Callable[..., Verdict], *runs: Runs) -> Verdict:
    """Return the verdict that two thirds of the choices give, with their number.

    Args:
        judge: Gives a verdict by runs whose first training and oracle choose the sets.
        runs: Its arguments.
    """
    found = [judge(*some) for some in choices(*runs)]
    kinds = [one.verdict for one in found]
    shown = max(dict.fromkeys(kinds), key=kinds.count)
    agree = kinds.count(shown)
    some = [one for one in found if one.verdict == shown]
    texts = [one.text for one in some]
    typical = _typical(some) or some[texts.index(max(texts, key=texts.count))]
    if agree < MOST_OF * len(found):
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        testable = kinds.count(NOT_TESTABLE) <= len(found) / 2
        kind = UNDECIDED if testable else NOT_TESTABLE
        said = f"{_CHOICES} give different verdicts: {counts}"
        return _said_of(typical, kind, 1.0, said)
    p_against = 1.0
    if shown == NOT_BORNE_OUT:
        needed = int(np.ceil(MOST_OF * len(found)))
        p_against = sorted(one.p_against for one in found)[needed - 1]
    assert shown in (BORNE_OUT, NOT_BORNE_OUT, UNDECIDED, NOT_TESTABLE)
    said = f"{agree} of {len(found)} {_CHOICES} give this verdict"
    if shown == NOT_TESTABLE and len(set(texts)) > 1:
        said += ", some of them with another number or reason"
    return _said_of(typical, shown, p_against, said)


def _typical(found: list[Verdict]) -> Verdict | None:
    """Return the verdict with the median effect, the lower of two; None without one."""
    measured = [(one.effect.estimate, one) for one in found if one.effect]
    if not measured:
        return None
    return sorted(measured, key=lambda pair: pair[0])[(len(measured) - 1) // 2][1]


def _said_of(typical: Verdict, kind: str, p_against: float, said: str) -> Verdict:
    """Return the verdict of all choices, with the effect of a typical one."""
    remarks = (*typical.remarks, said)
    return replace(typical, verdict=kind, p_against=p_against, remarks=remarks)
