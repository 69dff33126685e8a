"""Which recorded row speaks for which updates.

Update t starts from the weights after t-1 updates; a row describes the weights after
``steps[i]`` updates. Between two rows the norms are held constant: the row at the
interval's end (rule "right", the paper's), at its start ("left"), the mean of the two
losses ("trapezoid") or the larger ("max"). Updates before the first row or after the
last use that row, under every rule.

Rule "stratified" is for rows drawn at random: the run is cut into N equal parts, one
update of each is drawn, and the row has the weights from which that update starts. Its
loss times the part's length is unbiased for the sum over the part.

>>> for interval in intervals([2, 5], num_steps=6):
...     print(interval)
UpdateInterval(first=1, last=2, right=0, left=0)
UpdateInterval(first=3, last=5, right=1, left=0)
UpdateInterval(first=6, last=6, right=1, left=1)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect

RULES = ("right", "left", "trapezoid", "max")
STRATIFIED = "stratified"


def check_rule(rule: str) -> None:
    """Refuse an unknown rule."""
    expect(rule in RULES, "rule", repr(rule), f"in {RULES}", "The default is right.")


@dataclass(frozen=True)
class UpdateInterval:
    """Updates ``first`` to ``last`` (counted from 1) and the rows around them."""

    first: int
    last: int
    right: int
    left: int

    @property
    def num_updates(self) -> int:
        """How many updates there are."""
        return self.last - self.first + 1


def intervals(steps: ArrayLike, num_steps: int) -> list[UpdateInterval]:
    """All updates of a run, cut at its rows.

    Args:
        steps: int ``(N,)``, strictly increasing, at least one row.
        num_steps: T; the intervals cover the updates 1 … T.
    """
    rows = np.asarray(steps, dtype=np.int64)
    ends = np.unique(np.append(rows, num_steps))
    ends = ends[ends > 0]
    starts = np.concatenate([[0], ends])[: len(ends)]
    right = np.minimum(np.searchsorted(rows, ends), len(rows) - 1)
    left = np.maximum(np.searchsorted(rows, starts, side="right") - 1, 0)
    table = np.stack([starts + 1, ends, right, left], axis=1)
    return [UpdateInterval(*(int(x) for x in line)) for line in table]


def worst_case_over_epochs(
    parts: Sequence[UpdateInterval], sample_rates: ArrayLike, costs: ArrayLike
) -> float:
    """The most that updates cost an example that is in one of each epoch.

    Schedules but Poisson's show an example at most once in an epoch, the updates over
    which sample rates add up to 1. In which one is not known, so the dearest counts,
    and the last epoch counts even if it was broken off.

    Args:
        parts: All updates of a run, ``intervals``.
        sample_rates: Of each part.
        costs: What one update of each part costs an example that it holds.

    Returns:
        The sum over epochs.
    """
    rates, values = np.asarray(sample_rates, float), np.asarray(costs, float)
    passed = np.cumsum([p.num_updates for p in parts] * rates)
    slack = rates / 1000  # rounding moves an epoch's end by less than an update
    firsts = np.floor(np.append(0.0, passed)[:-1] + slack).astype(int)
    ends = np.ceil(passed - slack).astype(int)
    dearest = np.zeros(max(ends, default=0))
    for first, end, rate, cost in zip(firsts, ends, rates, values, strict=True):
        if rate > 0:
            dearest[first:end] = np.maximum(dearest[first:end], cost)
    return float(dearest.sum())


def stratum_ends(num_strata: int, num_steps: int) -> tuple[int, ...]:
    """Last updates of N equal parts of a run, round(T · i / N) for i = 1 … N.

    Args:
        num_strata: N, from 1 to T.
        num_steps: T.
    """
    return tuple(round(num_steps * i / num_strata) for i in range(1, num_strata + 1))


def strata(steps: ArrayLike, num_steps: int) -> list[tuple[int, UpdateInterval]]:
    """Each row's part of the run, and the one update that was drawn to stand for it.

    Part i holds the updates ``ends[i-1] + 1`` … ``ends[i]``; its row was measured after
    ``steps[i]`` updates, at the weights from which update ``steps[i] + 1`` starts.

    Args:
        steps: int ``(N,)``, one in each part.
        num_steps: T.

    Returns:
        The number of updates of each part, with its drawn update.

    Raises:
        ValueError: If a part has no row of its own.
    """
    rows = np.asarray(steps, dtype=np.int64)
    ends = np.array(stratum_ends(len(rows), num_steps), dtype=np.int64)
    starts = np.concatenate([[0], ends])[: len(ends)]
    expect(
        bool(((starts <= rows) & (rows < ends)).all()),
        "steps",
        rows.tolist(),
        f"to lie one in each of {len(rows)} equal parts of {num_steps} updates",
        "Record the whole run with Recorder.stratified, or choose another rule.",
    )
    # a schedule's values at the drawn update are those of the row that follows it
    right = np.minimum(np.arange(len(rows)) + 1, len(rows) - 1)
    return [
        (int(size), UpdateInterval(int(row) + 1, int(row) + 1, int(facts), number))
        for number, (size, row, facts) in enumerate(
            zip(ends - starts, rows, right, strict=True)
        )
    ]


def loss_under_rule(
    loss: Callable[[UpdateInterval, int], NDArray[Any]],
    interval: UpdateInterval,
    rule: str,
) -> NDArray[Any]:
    """One interval's loss under a rule.

    Args:
        loss: The interval's loss if the row given spoke for all of it.
        interval: Which updates.
        rule: One of ``RULES``.
    """
    if rule == "left":
        return loss(interval, interval.left)
    at_end = loss(interval, interval.right)
    if rule == "right" or interval.left == interval.right:
        return at_end
    at_start = loss(interval, interval.left)
    larger: NDArray[Any] = np.maximum(at_start, at_end)
    mean: NDArray[Any] = (at_start + at_end) / 2
    return larger if rule == "max" else mean
