"""Schedules that say after which updates a row of the ledger is due.

There are three: at a fixed distance in epochs, after listed updates (evenly spaced or
any), and at random, one row in each equal part of the run.

>>> num_due(7, every=0.5, sample_rate=0.25)  # a row every 2 updates
3
>>> num_due(7, every=(1, 5, 10), sample_rate=0.25)
2
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from opacus_pi._validate import expect, in_range, positive
from opacus_pi.accounting.rules import stratum_ends

Every = float | tuple[int, ...]


def num_due(num_steps: int, *, every: Every, sample_rate: float) -> int:
    """Return the number of rows that should have been written by now.

    Args:
        num_steps: Updates done.
        every: Epochs from row to row, or the updates after which rows are written.
        sample_rate: Share of the examples in an update; an epoch has 1 / sample_rate
            updates.

    Returns:
        A count; rows are due when it has grown.
    """
    if isinstance(every, tuple):
        return bisect_right(every, num_steps)
    # 49 * (1 / 49) is a little below 1: a row must not be late for that
    return math.floor(num_steps * sample_rate / every * (1 + 1e-12))


def checked_every(
    every: float | Sequence[int],
    *,
    remedy: str = "Pass a number of epochs, or increasing numbers of updates.",
) -> Every:
    """Return the option ``every`` as a float or as a tuple, checked.

    Args:
        every: Epochs from row to row, or the updates after which rows are written.
        remedy: One sentence: what the caller can do.

    Raises:
        ValueError: If it is not above 0 and finite, or not increasing.
    """
    if not isinstance(every, Sequence):
        positive(every=every, remedy=remedy)
        in_range(0, np.finfo(np.float64).max, every=every, remedy=remedy)
        return float(every)
    steps = tuple(int(step) for step in every)
    increasing = all(a < b for a, b in zip((-1, *steps), steps, strict=False))
    expect(
        increasing and len(steps) > 0 and list(steps) == list(every),
        "every",
        list(every),
        "must be strictly increasing whole numbers, at least 0",
        remedy,
    )
    return steps


def evenly_spaced_steps(num_checkpoints: int, num_steps: int) -> tuple[int, ...]:
    """Return evenly spaced rows, the last one after the last update.

    s_i = round(T · i / N) for i = 1 … N.

    Args:
        num_checkpoints: Number of rows, N.
        num_steps: Number of updates of the whole run, T.

    Returns:
        N increasing update counts.

    Raises:
        ValueError: If there are more rows than updates.
    """
    _check_num_checkpoints(num_checkpoints, num_steps)
    return stratum_ends(num_checkpoints, num_steps)


def stratified_steps(
    num_checkpoints: int, num_steps: int, generator: torch.Generator
) -> tuple[int, ...]:
    """Return rows at random, one in each of N equal parts of a run.

    Part i are the updates round(T·(i-1)/N) + 1 … round(T·i/N). One of them is drawn
    uniformly; its row is measured at the weights from which this update starts.

    Args:
        num_checkpoints: Number of rows, N.
        num_steps: Number of updates of the whole run, T.
        generator: Source of the random draws.

    Returns:
        N increasing update counts, the first possibly 0.

    Raises:
        ValueError: If there are more rows than updates.
    """
    _check_num_checkpoints(num_checkpoints, num_steps)
    ends = stratum_ends(num_checkpoints, num_steps)
    return tuple(
        int(torch.randint(start, end, (), generator=generator))
        for start, end in zip((0, *ends), ends, strict=False)
    )


def _check_num_checkpoints(num_checkpoints: int, num_steps: int) -> None:
    """Refuse more rows than updates."""
    in_range(
        1,
        num_steps,
        num_checkpoints=num_checkpoints,
        remedy="Ask for at least one row, and at most one for each update of the run.",
    )
