"""Rules that say which updates a row of a ledger stands for.

A ledger has a few rows, but every update of the run has a loss. Update t starts from
the weights after t-1 updates; a row holds the norms at the weights after ``steps[i]``
updates. Between two rows the norms are held constant: at those of the row at the
interval's end (rule "right", the paper's), at its start ("left"); or the two losses
are averaged ("trapezoid"), or the larger is taken ("max"). Updates before the first or
after the last row use that row, under every rule.

Rule "stratified" is for rows drawn at random: the run is cut into N equal parts
(strata), one update of each part is drawn, and the row has the weights from which that
update starts. Its loss times the part's length is unbiased for the sum over the part.

Rule "smoothed" is for swept rows far apart: the norms of a row hold for one of its
updates. The others are charged the mean loss over the norms that are plausible given
the example's norms in all rows (``predicted_losses``).

None of the rules gives a bound: the norms between rows are not known. How far each is
from exact norms at every update is measured in the benchmarks.

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
from opacus_pi._validate import expect, numbers
from opacus_pi.ledger.mechanism import SCHEDULED, NoisySGD

RULES = ("right", "left", "trapezoid", "max")
STRATIFIED = "stratified"
SMOOTHED = "smoothed"


def check_rule(rule: str) -> None:
    """Raise ``ValueError`` for a rule that is not in ``RULES``.

    Args:
        rule: The name to check.

    Raises:
        ValueError: If it is unknown.
    """
    expect(
        rule in RULES,
        "rule",
        repr(rule),
        f"must be in {RULES}",
        'Try "right", the default.',
    )


def require_steps(mechanism: NoisySGD, steps: ArrayLike | None) -> bool:
    """Return whether settings changed during training; the steps are needed then.

    Args:
        mechanism: Noise, clip norm and sampling of the run.
        steps: The ledger's steps ``(N,)``, if they were given.

    Raises:
        ValueError: If settings changed, and the steps are missing; or if steps are
            given that no ledger of this run has.
    """
    changed = [name for name in SCHEDULED if np.ndim(getattr(mechanism, name))]
    expect(
        steps is not None or not changed,
        "steps",
        None,
        f"must be given, because training changed {', '.join(changed)}",
        "Pass the ledger's steps.",
    )
    if steps is not None:
        num_rows = np.size(getattr(mechanism, changed[0])) if changed else None
        _check_steps(steps, mechanism.num_steps, num_rows)
    return bool(changed)


def _check_steps(steps: ArrayLike, num_steps: int, num_rows: int | None) -> None:
    """Refuse steps that are not those of a ledger.

    Args:
        steps: Updates after which its rows were written.
        num_steps: Updates of the run.
        num_rows: Rows of its schedules; None: there are none.
    """
    array, remedy = numbers("steps", steps), "Pass ledger.steps."
    expect(
        array.ndim == 1 and num_rows in (None, array.size),
        "steps",
        f"an array of shape {array.shape}",
        "must be a flat list with one entry for each row",
        remedy,
    )
    wrong = ~((array >= 0) & (array <= num_steps) & (array == np.floor(array)))
    wrong[1:] |= ~(np.diff(array) > 0)
    expect(
        not wrong.any(),
        "steps",
        array[wrong][:1],
        f"must be increasing whole numbers of updates, from 0 to {num_steps}",
        remedy,
    )


@dataclass(frozen=True)
class UpdateInterval:
    """Consecutive updates between two rows, and those rows.

    Args:
        first: First update, counted from 1.
        last: Last update, included.
        right: Position of the row at the interval's end (the last row if none follows).
        left: Position of the row at its start (the first row if none precedes).
    """

    first: int
    last: int
    right: int
    left: int

    @property
    def num_updates(self) -> int:
        """Number of updates in the interval."""
        return self.last - self.first + 1


def intervals(steps: ArrayLike, num_steps: int) -> list[UpdateInterval]:
    """Divide all updates of a run into intervals at the rows.

    Args:
        steps: int ``(N,)``, strictly increasing, at least one row.
        num_steps: T; the intervals cover the updates 1 … T.

    Returns:
        The intervals in order.
    """
    rows = np.asarray(steps, dtype=np.int64)
    ends = np.unique(np.append(rows, num_steps))
    ends = ends[ends > 0]
    starts = np.concatenate([[0], ends])[: len(ends)]
    right = np.minimum(np.searchsorted(rows, ends), len(rows) - 1)
    left = np.maximum(np.searchsorted(rows, starts, side="right") - 1, 0)
    columns = (column.tolist() for column in (starts + 1, ends, right, left))
    return [
        UpdateInterval(first=first, last=last, right=after, left=before)
        for first, last, after, before in zip(*columns, strict=True)
    ]


def worst_case_of_fixed(
    parts: Sequence[UpdateInterval],
    facts: Sequence[NoisySGD],
    divergences: Sequence[float],
) -> float:
    """Bound the loss of an example under fixed sampling.

    Args:
        parts: All updates of a run, as from ``intervals``.
        facts: The mechanism at each part.
        divergences: Divergence of one update of each part for an example in its batch,
            in nats.

    Returns:
        The bound in nats: from the largest count of participations if it was recorded,
        otherwise from one participation in every epoch.
    """
    if not facts or facts[0].max_participations is None:
        rates = [float(fact.sample_rate) for fact in facts]
        return worst_case_over_epochs(parts, rates, divergences)
    return worst_case_of_count(parts, facts[0].max_participations, divergences)


def worst_case_of_count(
    parts: Sequence[UpdateInterval], num_participations: int, divergences: ArrayLike
) -> float:
    """Bound the loss of an example that is in a known number of updates.

    In which updates it was is not used: the most expensive ones count.

    Args:
        parts: All updates of a run, as from ``intervals``.
        num_participations: In how many updates the example was at most.
        divergences: Divergence of one update of each part for an example in its batch,
            ``(len(parts),)``, in nats.

    Returns:
        The sum of the largest divergences, in nats.
    """
    total, left = 0.0, num_participations
    values = np.asarray(divergences, float)
    sizes = (part.num_updates for part in parts)
    by_cost = sorted(zip(values, sizes, strict=True), reverse=True)
    for value, num_updates in by_cost:
        taken = min(left, num_updates)
        if taken:
            total += taken * value
        left -= taken
    return float(total)


def worst_case_over_epochs(
    parts: Sequence[UpdateInterval], sample_rates: ArrayLike, divergences: ArrayLike
) -> float:
    """Bound the loss of an example that is in one update of every epoch.

    Under fixed sampling an example is in at most one update of each epoch (a stretch of
    updates whose sample rates add up to 1). Which one is not known, so the most
    expensive counts; an incomplete last epoch counts in full.

    Args:
        parts: All updates of a run, as from ``intervals``.
        sample_rates: Sample rate of each part, ``(len(parts),)``.
        divergences: Divergence of one update of each part for an example in its batch,
            ``(len(parts),)``, in nats.

    Returns:
        The sum over epochs of the largest divergence, in nats.
    """
    rates, values = np.asarray(sample_rates, float), np.asarray(divergences, float)
    num_epochs = np.cumsum([p.num_updates for p in parts] * rates)
    slack = rates / 1000  # rounding moves the end of an epoch by less than one update
    # Each part touches the epochs first … end - 1; in each of them it may hold the
    # example's one update. It shares only the first and the last with other parts, so
    # the others are counted and not listed: a run may have any number of epochs.
    used = rates > 0
    firsts = np.floor(np.append(0.0, num_epochs)[:-1] + slack).astype(int)[used]
    lasts = np.ceil(num_epochs - slack).astype(int)[used] - 1
    values, inner = values[used], np.maximum(lasts - firsts - 1, 0)
    shared, places = np.unique(np.append(firsts, lasts), return_inverse=True)
    largest = np.zeros(len(shared))
    np.maximum.at(largest, places.reshape(-1), np.append(values, values))
    return float(largest.sum() + (inner[inner > 0] * values[inner > 0]).sum())


def stratum_ends(num_strata: int, num_steps: int) -> tuple[int, ...]:
    """Return the last updates of N equal parts of a run, round(T · i / N), i = 1 … N.

    Args:
        num_strata: N, from 1 to T.
        num_steps: T.

    Returns:
        N integers; the last is T.
    """
    return tuple(round(num_steps * i / num_strata) for i in range(1, num_strata + 1))


def strata(steps: ArrayLike, num_steps: int) -> list[tuple[int, UpdateInterval]]:
    """Return each part's number of updates, and the update drawn to represent it.

    Part i holds the updates ``ends[i-1] + 1`` … ``ends[i]``. Its row was measured after
    ``steps[i]`` updates, at the weights from which update ``steps[i] + 1`` starts.

    Args:
        steps: int ``(N,)``, one in each part.
        num_steps: T.

    Returns:
        For each part its number of updates, and the drawn update as an interval of one.

    Raises:
        ValueError: If a part has no row.
    """
    rows = np.asarray(steps, dtype=np.int64)
    ends = np.array(stratum_ends(len(rows), num_steps), dtype=np.int64)
    starts = np.concatenate([[0], ends])[: len(ends)]
    expect(
        bool(((starts <= rows) & (rows < ends)).all()),
        "steps",
        rows.tolist(),
        f"must have one row in each of {len(rows)} equal parts of {num_steps} updates",
        "Record the whole run with Recorder.stratified, or choose another rule.",
    )
    # Scheduled values (noise, sample rate) at the drawn update are those of the row
    # that follows it, as for every update.
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
    """Return one interval's loss under a rule.

    Args:
        loss: Function of an interval and a row: the interval's loss if that row's norms
            held for all its updates, ``(n,)``.
        interval: The interval.
        rule: One of ``RULES``.

    Returns:
        float64 ``(n,)``, in nats.
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
