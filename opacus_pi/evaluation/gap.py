"""The gap between an unlearned model and retrained models, over the whole run.

The time to unlearn is one number of a run: the first time at which a metric is near its
value for retrained models. It does not say whether the model stayed there, how far away
it started, or what became of its accuracy. The summary of this file does. Two forget
sets can differ in two ways: one has *farther* to go (a larger gap before unlearning),
or one is *slower* (a larger part of its gap remains, on average over the run).

>>> trace = UnlearningTrace()
>>> for epoch, accuracy in enumerate([0.1, 0.3, 0.46, 0.5]):
...     trace.append(epoch, {"unlearning_accuracy": accuracy})
>>> found = gap_summary(trace, [0.48, 0.52], metric="unlearning_accuracy")
>>> round(found.initial, 3), found.settled_time, found.closed
(0.4, 2.0, 1.0)
>>> round(found.area, 3), round(found.relative_area, 3)
(0.44, 0.367)
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect
from opacus_pi.evaluation.trace import (
    OracleValues,
    UnlearningTrace,
    arrived,
    mean_of_oracle,
    time_to_unlearn,
)


class GapSummary(NamedTuple):
    """Summary of one metric's gap to retrained models over a run.

    Attributes:
        initial: Distance before unlearning, at least 0, in the unit of the metric.
        final: Distance after the run.
        closed: Fraction of the initial distance that was closed: 1 if the run ended at
            the retrained models, negative if it ended farther away; NaN without an
            initial distance.
        area: Area under the distance over the run, in unit of the metric × unit of
            time (trapezoidal rule).
        relative_area: The area divided by initial distance and length of the run: the
            mean share of the distance that remained. 1 if nothing happened; NaN without
            an initial distance.
        first_time: ``time_to_unlearn``: first time within the tolerance; infinity:
            never.
        settled_time: First time from which on the metric stays within the tolerance,
            with the utility kept if one was named; infinity: never.
        overshot: Whether the run ended beyond the tolerance on the other side of the
            retrained models than it started.
    """

    initial: float
    final: float
    closed: float
    area: float
    relative_area: float
    first_time: float
    settled_time: float
    overshot: bool


def gap_path(
    trace: UnlearningTrace, oracle: OracleValues, *, metric: str
) -> NDArray[np.float64]:
    """Return the signed distance of a metric from the mean of the retrained models.

    Args:
        trace: The run.
        oracle: As for ``time_to_unlearn``.
        metric: Name of the metric.

    Returns:
        float64 ``(k,)``, one value for each evaluation; 0: as the retrained models.

    Raises:
        ValueError: If the metric was not evaluated on the run or the retrained models.
    """
    path: NDArray[np.float64] = trace[metric] - mean_of_oracle(oracle, metric)
    return path


def gap_summary(
    trace: UnlearningTrace,
    oracle: OracleValues,
    *,
    metric: str,
    tolerance: float = 0.05,
    utility: str | None = None,
) -> GapSummary:
    """Summarise the distance of one metric from retrained models over a whole run.

    Args:
        trace: The run, with at least two evaluations; the first one at time 0, before
            unlearning.
        oracle: As for ``time_to_unlearn``; a mapping that contains ``utility`` if one
            is named.
        metric: Name of the metric.
        tolerance: Largest distance that counts as arrived; as for ``time_to_unlearn``.
        utility: Name of a metric that must not fall more than the tolerance below its
            value for the retrained models while a run counts as settled, for example
            ``"test_accuracy"``. None: settled by ``metric`` alone.

    Returns:
        The summary.

    Raises:
        ValueError: If a metric is missing, the trace has fewer than two evaluations or
            does not begin at time 0, or the tolerance is negative.
    """
    path = gap_path(trace, oracle, metric=metric)
    expect(
        len(path) > 1 and trace.times[0] == 0,
        "trace",
        f"evaluations at {trace.times}",
        "must have an evaluation at time 0 and a later one",
        "Evaluate the model before unlearning and after every epoch.",
    )
    gap, times = np.abs(path), np.array(trace.times)
    area = float((np.diff(times) * (gap[1:] + gap[:-1]) / 2).sum())
    initial, final = float(gap[0]), float(gap[-1])
    other_side = bool(path[0] * path[-1] < 0)
    near = arrived(trace, oracle, metric=metric, tolerance=tolerance)
    kept = np.ones_like(near)
    if utility is not None:
        kept = gap_path(trace, oracle, metric=utility) >= -tolerance
    return GapSummary(
        initial=initial,
        final=final,
        closed=1 - final / initial if initial else float("nan"),
        area=area,
        relative_area=area / (initial * float(times[-1])) if initial else float("nan"),
        first_time=time_to_unlearn(trace, oracle, metric=metric, tolerance=tolerance),
        settled_time=_settled(times, near & kept),
        overshot=other_side and not bool(near[-1]),
    )


def _settled(times: NDArray[np.float64], there: NDArray[np.bool_]) -> float:
    """Return the first time from which on a condition holds; infinity: never."""
    if not there[-1]:
        return float("inf")
    missing = np.flatnonzero(~there)
    return float(times[missing[-1] + 1] if missing.size else times[0])
