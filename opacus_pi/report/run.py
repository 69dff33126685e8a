"""The facts of an unlearning run: before, after, and beside retrained models.

``run_facts`` collects them as a mapping that can be written as JSON. The page is made
from the same mapping, so the two cannot disagree. The record of a run lists the
forgotten examples; the report says only how many they are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.evaluation.intervals import prediction_margin
from opacus_pi.evaluation.trace import UnlearningTrace, arrived, time_to_unlearn
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.report.belonging import require_same_training
from opacus_pi.report.scores import Scores
from opacus_pi.unlearning.plan import percentile_of

TOLERANCE = (
    0.05  # the paper's: a run is near the retrained models when it is that close
)
MIN_ORACLES = 3  # with fewer, how much retrained models differ is hardly known
CONFIDENCE = 0.95  # that one more retrained model would be judged to be like the others
MEANING = {
    "unlearning_accuracy": "share of the forget set that is misclassified",
    "retain_accuracy": "accuracy on the retain set",
    "test_accuracy": "accuracy on unseen data",
    "forget_loss": "mean loss on the forget set",
    "forget_confidence": "mean probability of the correct label, forget set",
    "membership_inference": "share of the forget set that an attacker calls unseen",
    "attacker_accuracy": "the attacker's own balanced accuracy; 0.5 is guessing",
}
EXACT_REWIND = "exact rewind"
# Entries of a record that are not settings: the page shows the method elsewhere, and
# must not name the forgotten examples, nor the seed from which the noise follows.
_NOT_SETTINGS = (
    *("method", "forget_indices", "forgotten_before", "not_checked", "seed"),
    *("ledgers", "trained_weights", "unlearned_weights", "files", "finished"),
    "num_kept_exact",
)


class Unlearned(Protocol):
    """The result of ``Unlearner.unlearn`` without its model, as a report needs it.

    A protocol, because the command line reads a run back from files, without loading
    the weights. Anything with these three attributes can be reported. The record may
    have sentences about files that may not belong together, as ``"not_checked"``.
    """

    @property
    def trace(self) -> UnlearningTrace: ...  # noqa: D102
    @property
    def guarantee(self) -> Guarantee: ...  # noqa: D102
    @property
    def record(self) -> Mapping[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Barriers:
    """Loss barriers to retrained models, and between retrained models.

    Args:
        to_oracles: From the unlearned model to each retrained model.
        between_oracles: Between all pairs of retrained models; empty if there is only
            one.
        matched: Whether hidden units were matched before the barriers were measured.
    """

    to_oracles: Sequence[float]
    between_oracles: Sequence[float] = ()
    matched: bool = False

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Barriers":
        """Read barriers that were written as JSON.

        Args:
            facts: The JSON object.

        Returns:
            The barriers; every value was converted to a number.

        Raises:
            KeyError, TypeError, ValueError: If the facts are something else.
        """
        pairs = [float(value) for value in facts["between_oracles"]]
        return cls(
            to_oracles=[float(value) for value in facts["to_oracles"]],
            between_oracles=pairs,
            matched=bool(facts["matched"]),
        )


def run_facts(
    result: Unlearned,
    runs: Sequence[GradNormLedger],
    scores: Scores,
    oracle: Mapping[str, ArrayLike] | None,
    barriers: Barriers | None,
) -> dict[str, Any]:
    """Return the part of a report that covers unlearning, JSON-able.

    The facts say how many examples were forgotten, never which.

    Args:
        result: The unlearning run.
        runs: The ledgers of the training that it started from.
        scores: The per-example numbers of the training that it started from.
        oracle: The metrics of retrained models by name, or None.
        barriers: Loss barriers to those models, or None.

    Raises:
        ValueError: If the run started from another training.
    """
    record = result.record
    return {
        "method": record.get("method"),
        "settings": {k: v for k, v in record.items() if k not in _NOT_SETTINGS},
        "forget_set": _forget_set(record, scores),
        "not_checked": [
            *record.get("not_checked", ()),
            *require_same_training(record, runs),
        ],
        "metrics": _metrics(result.trace, oracle or {}),
        "trace": result.trace,
        "oracle": {k: np.ravel(v) for k, v in (oracle or {}).items()},
        "barriers": barriers,
        "guarantee": json.loads(result.guarantee.to_json()),
        "delta": scores.delta,
        "epsilon": result.guarantee.epsilon(scores.delta),
        "guarantee_in_words": result.guarantee.text(scores.delta).splitlines(),
    }


def _forget_set(record: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
    """Return the size of the forget set, and its difficulty if that is known.

    It is known only if the ledger contains every example of the set. An exact rewind
    forgets its set and all earlier ones exactly; another run only keeps what earlier
    exact rewinds have done.

    Args:
        record: The record of the run, which lists the forgotten examples.
        scores: The per-example numbers.
    """
    forget = np.asarray(record.get("forget_indices", []), dtype=np.int64)
    before = record.get("forgotten_before", [])
    facts: dict[str, Any] = {"size": len(forget), "forgotten_before": len(before)}
    exactly = record.get("num_kept_exact")
    if record.get("method") == EXACT_REWIND:
        exactly = len({*forget.tolist(), *before})
    if exactly:
        facts["exactly_forgotten"] = exactly
    if len(forget) and np.isin(forget, scores.ids).all():
        columns = np.flatnonzero(np.isin(scores.ids, forget))
        facts["mean_loss"] = float(scores.losses[columns].mean())
        facts["percentile"] = percentile_of(scores.losses, columns)
    return facts


def _metrics(
    trace: UnlearningTrace, oracle: Mapping[str, ArrayLike]
) -> list[dict[str, Any]]:
    """Return each metric before and after the run, and of retrained models.

    Args:
        trace: The metrics over time. A metric that was never evaluated is left out.
        oracle: The metrics of retrained models by name, maybe none.

    Returns:
        For each metric ``name``, ``before`` (None if nothing was evaluated then),
        ``after``, and what ``_oracle_facts`` returns if retrained models have it.
    """
    return [
        {
            "name": name,
            "before": values[0] if trace.begins_before else None,
            "after": values[-1],
            **(_oracle_facts(trace, name, oracle) if name in oracle else {}),
        }
        for name, values in trace.metrics.items()
        if values
    ]


def _oracle_facts(
    trace: UnlearningTrace, name: str, oracle: Mapping[str, ArrayLike]
) -> dict[str, Any]:
    """Return a metric of retrained models, and how near the run came to it.

    Args:
        trace: The metrics of the run over time.
        name: The metric.
        oracle: The metrics of retrained models; it must contain this one.

    Returns:
        Mean, standard deviation (None for a single model) and number of the retrained
        models' values; the time and its unit, ``inf`` if the run never came within the
        tolerance; and ``is_like_retrained``, whether the model after the run is where
        one more retrained model would be.
    """
    time = time_to_unlearn(trace, oracle, metric=name, tolerance=TOLERANCE)
    near = arrived(trace, oracle, metric=name, tolerance=TOLERANCE)
    values = np.asarray(oracle[name], dtype=np.float64).ravel()
    return {
        "oracle_mean": values.mean(),
        "oracle_std": values.std(ddof=1) if len(values) > 1 else None,
        "num_oracles": len(values),
        "time": time,
        "unit": trace.unit,
        "is_like_retrained": bool(near[-1])
        or _is_like_retrained(trace.metrics[name][-1], values),
    }


def _is_like_retrained(value: float, oracle: NDArray[np.float64]) -> bool | None:
    """Return whether a value is where one more retrained model's would be.

    It is, if it is inside the 95 % prediction interval of the retrained models.

    Args:
        value: Of the model after the run, not within the tolerance of their mean.
        oracle: Those of retrained models, float64 ``(k,)``.

    Returns:
        None, not judged, if there are fewer than three retrained models, or all of them
        have the same value: how much they differ is not known then.
    """
    if len(oracle) < MIN_ORACLES or not np.ptp(oracle) > 0:
        return None
    margin = prediction_margin(oracle, confidence=CONFIDENCE)
    return abs(value - float(oracle.mean())) <= margin
