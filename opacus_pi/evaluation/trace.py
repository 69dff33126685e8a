"""Traces of unlearning: the metrics of a model over time, and the time to unlearn.

The time to unlearn is the first time at which a metric is near its value for retrained
models. "Near", and not "at least", because a model can also forget too much: accuracy
on the forget set below that of retrained models reveals the set just as well.

>>> trace = UnlearningTrace()
>>> for epoch, accuracy in enumerate([0.1, 0.3, 0.44, 0.5]):
...     trace.append(epoch, {"unlearning_accuracy": accuracy})
>>> time_to_unlearn(trace, oracle=[0.46, 0.50], metric="unlearning_accuracy")
2.0
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi._frames import frame
from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, numbers, require
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.regular_file import require_regular

if TYPE_CHECKING:
    import pandas as pd

_KIND = "opacus_pi.UnlearningTrace"
_VERSION = 1
_ROUNDING = 1e-12
_GUS = "gaussian_unlearning_score"
OracleValues = float | ArrayLike | Mapping[str, ArrayLike]


@dataclass(repr=False)
class UnlearningTrace(Shown):
    """The metrics of one unlearning run at increasing times.

    Args:
        times: Time of each evaluation, ``(k,)``, strictly increasing. Time 0 is before
            unlearning. Fractions are allowed, for several evaluations in an epoch.
        metrics: Values of each metric at those times, ``(k,)`` each, by name.
        unit: Unit of ``times``.
        cost: Total cost of the run by name, e.g. ``seconds``, ``num_examples``
            (examples passed through training) or ``num_evaluated`` (examples that were
            evaluated).

    Raises:
        ValueError: If times do not increase or a metric has another length.
    """

    _note: ClassVar[str] = "to_frame() has the values"

    times: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    unit: str = "epochs"
    cost: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.times = [float(time) for time in self.times]
        self.metrics = {
            name: [float(value) for value in values]
            for name, values in self.metrics.items()
        }
        self.cost = {name: float(value) for name, value in self.cost.items()}
        remedy = 'Say what the times count, e.g. "epochs".'
        expect(
            isinstance(self.unit, str), "unit", self.unit, "must be a string", remedy
        )
        expect(
            bool((np.diff(self.times) > 0).all() and np.isfinite(self.times).all()),
            "times",
            self.times,
            "must be finite and strictly increasing",
            "Append evaluations in the order in which they were made.",
        )
        for name, values in self.metrics.items():
            expect(
                len(values) == len(self.times),
                f"metrics[{name!r}]",
                f"{len(values)} values",
                f"must have one value at each of {len(self.times)} times",
                "Evaluate the same metrics every time.",
            )

    def _shown(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "evaluations": len(self),
            "last_time": self.times[-1] if self.times else None,
            "metrics": ", ".join(self.metrics),
        }

    @property
    def begins_before(self) -> bool:
        """Return whether the first evaluation was made before unlearning, at time 0."""
        return bool(self.times) and self.times[0] == 0

    def __len__(self) -> int:
        """Return the number of evaluations."""
        return len(self.times)

    def append(self, time: float, metrics: Mapping[str, float]) -> None:
        """Add one evaluation.

        Args:
            time: Time of the evaluation in ``unit``; later than the previous one.
            metrics: Value of each metric; the names must be the same at every call.

        Raises:
            ValueError: If the time does not increase, the names differ, or ``metrics``
                is not a mapping to numbers. Nothing is added then.
        """
        values = _numbers_by_name(metrics)
        expect(
            bool(np.isfinite(time)),
            "time",
            time,
            "must be finite",
            f"Pass the time of the evaluation, in {self.unit}.",
        )
        expect(
            not self.times or time > self.times[-1],
            "time",
            time,
            f"must be later than {self.times[-1] if self.times else None}",
            "Append evaluations in the order in which they were made.",
        )
        expect(
            not self.times or set(values) == set(self.metrics),
            "metrics",
            sorted(values),
            f"must be named {sorted(self.metrics)}",
            "Evaluate the same metrics every time.",
        )
        self.times.append(float(time))
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value)

    def __getitem__(self, metric: str) -> NDArray[np.float64]:
        """Return the values of one metric, float64 ``(k,)``."""
        expect(
            metric in self.metrics,
            "metric",
            repr(metric),
            f"must be one of {sorted(self.metrics)}",
            "Name a metric that was evaluated during the run.",
        )
        return np.array(self.metrics[metric], dtype=np.float64)

    def to_frame(self) -> "pd.DataFrame":
        """Return the metrics as a data frame of pandas.

        Returns:
            One line for each evaluation, one column for each metric; the index is the
            time, named by its unit.

        Raises:
            ImportError: If pandas is not installed.
        """
        return frame({self.unit: self.times, **self.metrics}, index=self.unit)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON, atomically.

        The file has a kind, a version and a checksum. It is JSON and not an array file,
        because it is small, and other programs should be able to read it.

        Args:
            path: The file's name; an existing file is replaced in one step.
        """
        content = {"kind": _KIND, "version": _VERSION, **asdict(self)}
        content["checksum"] = _digest(content)
        replace_file(Path(path), json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UnlearningTrace":
        """Read a trace that ``save`` wrote.

        Args:
            path: The file's name.

        Returns:
            The trace.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a trace, has another format version, or was
                edited.
        """
        content = _read_json(Path(path))
        checksum = content.pop("checksum", None)
        found = content.pop("kind", None), content.pop("version", None)
        expect(
            found == (_KIND, _VERSION),
            "path",
            f"{_in_words(*found)} in {os.fspath(path)}",
            f"must contain {_KIND} of version {_VERSION}",
            "Pass a file that UnlearningTrace.save of this release wrote.",
        )
        require(
            checksum == _digest({"kind": _KIND, "version": _VERSION, **content}),
            f"{os.fspath(path)} does not match its checksum.",
            "It was edited or damaged: unlearn again, or restore the file from a copy.",
        )
        try:
            _require_numbers(content)
            return cls(**content)
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"path must contain {_KIND}, got other content in {path}: {error}. "
                "Pass a file that UnlearningTrace.save wrote."
            ) from error


def time_to_unlearn(
    trace: UnlearningTrace,
    oracle: OracleValues,
    *,
    metric: str,
    tolerance: float = 0.05,
) -> float:
    """Return the first time at which a metric is within the tolerance of the oracle.

    This is the first evaluation with abs(trace - oracle) <= tolerance, in the unit of
    the metric (five points of accuracy by default). ``gaussian_unlearning_score`` has
    no natural scale; for it the tolerance is a fraction of the distance before
    unlearning, abs(trace - oracle) <= tolerance * abs(before - oracle).

    Args:
        trace: The run.
        oracle: The metric of models retrained without the forget set: a number, an
            array over seeds (their mean is taken), or a mapping from metric to either.
        metric: Name of the metric.
        tolerance: Largest distance from the oracle that counts as arrived.

    Returns:
        A time in the unit of the trace: 0 if the metric was within the tolerance before
        unlearning, infinity if it never was.

    Raises:
        ValueError: If the metric was not evaluated, the trace or the oracle is empty
            or not a number, or the tolerance is negative.

    Source: paper, Section 5.1 and Figures 1, 6-8.
    """
    there = np.flatnonzero(arrived(trace, oracle, metric=metric, tolerance=tolerance))
    return trace.times[there[0]] if there.size else float("inf")


def arrived(
    trace: UnlearningTrace,
    oracle: OracleValues,
    *,
    metric: str,
    tolerance: float = 0.05,
) -> NDArray[np.bool_]:
    """Return at which evaluations a metric is within the tolerance of the oracle.

    Args:
        trace: As for ``time_to_unlearn``.
        oracle: As for ``time_to_unlearn``.
        metric: As for ``time_to_unlearn``.
        tolerance: As for ``time_to_unlearn``.

    Returns:
        bool ``(k,)``, one entry for each evaluation.
    """
    values = trace[metric]
    expect(len(values) > 0, "trace", "[]", "must contain an evaluation", "Append one.")
    expect(tolerance >= 0, "tolerance", tolerance, "must be at least 0", "Try 0.05.")
    distance = np.abs(values - mean_of_oracle(oracle, metric))
    limit = tolerance
    if metric == _GUS:
        expect(
            trace.times[0] == 0,
            "trace.times[0]",
            trace.times[0],
            "must be 0",
            "Evaluate before unlearning, too: the tolerance is relative to the "
            "distance at time 0.",
        )
        limit = tolerance * distance[0]
    result: NDArray[np.bool_] = distance <= limit + _ROUNDING
    return result


def mean_of_oracle(oracle: OracleValues, name: str) -> Any:
    """Return the oracle's value of a metric, averaged over seeds.

    Args:
        oracle: As for ``time_to_unlearn``.
        name: The metric.

    Raises:
        ValueError: If it is missing, empty or not finite.
    """
    if isinstance(oracle, Mapping):
        expect(
            name in oracle,
            "oracle",
            sorted(oracle),
            f"must contain {name!r}",
            "Evaluate the same metrics on the oracle.",
        )
        oracle = oracle[name]
    values = numbers("oracle", oracle)
    expect(
        values.size > 0 and bool(np.isfinite(values).all()),
        "oracle",
        values,
        "must contain finite numbers",
        "Retrain at least one model without the forget set and evaluate it.",
    )
    return values.mean()


def _in_words(kind: object, version: object) -> str:
    """Return which file a JSON object says that it is."""
    if kind is None:
        return "a JSON object of no known kind"
    return f"{kind} of version {version}"


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, or raise a clear error.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is not a complete JSON object.
    """
    require_regular(path)
    try:
        content = plain_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        content = error
    expect(
        isinstance(content, dict),
        "path",
        path,
        f"must be a whole JSON file of {_KIND}",
        "The file is truncated, or it is not a trace. Pass a file that "
        "UnlearningTrace.save wrote, or restore it from a copy.",
    )
    return cast(dict[str, Any], content)


def _require_numbers(content: Mapping[str, Any]) -> None:
    """Raise unless the fields exist and hold numbers only.

    ``float`` would also convert strings and booleans. A file that contains them was not
    written by ``save``.

    Raises:
        TypeError: If a field is missing, or has a value that is not an int or a float.
    """
    for name, kind in (("times", list), ("metrics", dict), ("cost", dict)):
        if name not in content:
            raise TypeError(f"the field {name} is missing")
        if not isinstance(content[name], kind):
            raise TypeError(f"{name} is not a {kind.__name__}")
    columns = {
        "times": content["times"],
        **{f"metrics[{name!r}]": c for name, c in content["metrics"].items()},
        "cost": list(content["cost"].values()),
    }
    for name, column in columns.items():
        if not isinstance(column, list):
            raise TypeError(f"{name} is not a list of numbers")
        if {type(value) for value in column} - {int, float}:
            raise TypeError(f"{name} has a value that is not an int or a float")


def _digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object; layout and order do not matter.

    Args:
        content: Everything in the file except the checksum.
    """
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers_by_name(metrics: object) -> dict[str, float]:
    """Return metrics as floats by name, or say how they should look.

    Args:
        metrics: What an evaluation returned.

    Raises:
        ValueError: If it is not a mapping from names to single numbers.
    """
    remedy = 'Return named numbers from evaluate(model): {"test_accuracy": 0.91}.'
    wanted = "must be a dict of numbers by name"
    if not isinstance(metrics, Mapping):
        expect(False, "metrics", repr(metrics), wanted, remedy)
        raise AssertionError  # expect has raised
    values: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"metrics[{name!r}] must be a single number, got {type(value).__name__}"
                f" ({error}). {remedy}"
            ) from error
    return values
