"""What has been recorded of a run so far: rows, intervals, and how to save them.

A row is what was measured of every example at one moment; the interval before it is
what the updates that led there were run with. Nothing here decides when to measure.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.ledger.fingerprint import same_data_set
from opacus_pi.recording.saved_run import LATER_TEXTS, VERSION, require_whole
from opacus_pi.recording.schedule import Every, num_due

_FACTS = ("source", "num_examples", "sample_rate", "sampling", "data_set")
_COUNTS = ("num_steps", "refusal")
_ROW = "rows."


class Settings(NamedTuple):
    """What one update, or every update of an interval, was run with."""

    noise_std: float
    max_grad_norm: float
    sample_rate: float

    def widened(self, other: "Settings") -> "Settings":
        """The settings no safer than either: least noise, most of the rest.

        A loss never decreases in ``max_grad_norm`` or ``sample_rate`` and never
        increases in ``noise_std``, so an interval is never charged too little.
        """
        return Settings(
            min(self.noise_std, other.noise_std),
            max(self.max_grad_norm, other.max_grad_norm),
            max(self.sample_rate, other.sample_rate),
        )


_NO_UPDATE = Settings(math.inf, 0.0, 0.0)  # the widened of it and another is the other


@dataclass
class RecordedRun:
    """The record of one training run while it is being made.

    Args:
        source: ``"observed"`` or ``"swept"``.
        num_examples: Number of examples, n.
        sample_rate: Sample rate that the run was announced with.
        sampling: ``"poisson"`` or ``"fixed"``.
        data_set: Fingerprint of the data set.
    """

    source: str
    num_examples: int
    sample_rate: float
    sampling: str
    data_set: str
    num_steps: int = 0
    refusal: str = ""
    weights: str = ""  # name of the last update's, if it was asked for
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    intervals: list[Settings] = field(default_factory=list)
    open_interval: Settings | None = None
    observed: NDArray[np.float32] = field(init=False)
    # in which update, of what other processes have not been told; 0: nothing
    observed_at: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.num_examples = int(self.num_examples)
        self.sample_rate = float(self.sample_rate)
        self._forget_observations()

    def _forget_observations(self) -> None:
        """Start a row of which nothing has been observed."""
        size = self.num_examples if self.source == "observed" else 0
        self.observed = np.full(size, np.nan, dtype=np.float32)
        self.observed_at = np.zeros(size, dtype=np.int64)

    @property
    def num_unmerged(self) -> int:
        """Of how many examples there is news for other processes."""
        return int(np.count_nonzero(self.observed_at))

    def require_examples(self, indices: NDArray[np.int64]) -> None:
        """Refuse positions outside the data set.

        Raises:
            ValueError: If an index is no example's.
        """
        if indices.size and not (
            0 <= indices.min() and indices.max() < self.num_examples
        ):
            outside = (indices < 0) | (indices >= self.num_examples)
            expect(
                False,
                "indices",
                indices[outside][:1],
                f"must be in [0, {self.num_examples})",
                "They are positions in the data set that the recorder began with.",
            )

    def observe(
        self,
        indices: NDArray[np.int64],
        norms: NDArray[np.float32],
        *,
        steps: int | NDArray[np.int64],
    ) -> None:
        """Keep norms as the examples' latest observation, made in these updates.

        Raises:
            ValueError: If an index is no example's.
        """
        self.require_examples(indices)
        self.observed[indices] = norms  # numpy: of equal indices the last one stays
        self.observed_at[indices] = steps

    def count_step(self, settings: Settings) -> None:
        """Count one update."""
        self.num_steps += 1
        self.weights = ""
        interval = self.open_interval
        self.open_interval = interval.widened(settings) if interval else settings

    def row_is_due(self, every: Every) -> bool:
        """Whether rows are due that the last one written does not stand for."""
        counts = (self.num_steps, self.steps[-1] if self.steps else 0)
        now, then = (
            num_due(count, every=every, sample_rate=self.sample_rate)
            for count in counts
        )
        return now > then

    def close_row(self, row: dict[str, NDArray[np.float32]]) -> None:
        """Add a row for the weights of now; the next interval starts."""
        self.steps.append(self.num_steps)
        self.rows.append(row)
        self.intervals.append(self.open_interval or _NO_UPDATE)
        self.open_interval = None
        self._forget_observations()

    def ledger(self) -> GradNormLedger:
        """The record up to now, as a ledger of its own.

        Updates after the last row: what was observed in them is one more row; a swept
        record has measured nothing since, so the last row's settings are widened.

        Raises:
            AccountingError: If nothing has been recorded.
        """
        steps, rows, intervals = list(self.steps), list(self.rows), list(self.intervals)
        if self.open_interval and self.source == "observed":
            steps.append(self.num_steps)
            rows.append({"grad_norms": self.observed})
            intervals.append(self.open_interval)
        elif self.open_interval and rows:
            intervals[-1] = intervals[-1].widened(self.open_interval)
        if len(rows) > 1 and intervals[0] == _NO_UPDATE:
            intervals[0] = intervals[1]
        if not rows or self.num_steps == 0:
            raise AccountingError(
                f"No row has been recorded after {self.num_steps} updates. Train on, "
                "or record more often: Recorder(every=...) counts in epochs."
            )
        facts: dict[str, Any] = {n: _constant(v) for n, v in _columns(intervals)}
        mechanism = NoisySGD(num_steps=self.num_steps, sampling=self.sampling, **facts)
        measured: dict[str, Any] = {
            name: np.stack([row[name] for row in rows]) for name in rows[0]
        }
        return GradNormLedger(
            mechanism,
            np.array(steps, dtype=np.int64),
            source=self.source,
            data_set=self.data_set,
            weights=self.weights or None,
            **measured,
        )

    def require_same(self, other: "RecordedRun") -> None:
        """Refuse to continue one run as another.

        Raises:
            ValueError: If what was recorded, the data set or the sampling differ.
        """
        for name in _FACTS:
            ours, others = getattr(self, name), getattr(other, name)
            is_data_set = name == "data_set"
            expect(
                same_data_set(ours, others) if is_data_set else ours == others,
                f"the resumed record's {name}",
                repr(ours),
                f"must be this run's, {others!r}",
                "Resume with the data set, sampling and Recorder of the run saved.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, as tensors, numbers and strings."""
        still_open = [self.open_interval] if self.open_interval else []
        names = self.rows[0] if self.rows else ()
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in (*_FACTS, *_COUNTS, *LATER_TEXTS)},
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "intervals": _table(self.intervals),
            "open_interval": _table(still_open),
            "observed": torch.from_numpy(self.observed.copy()),
            "observed_at": torch.from_numpy(self.observed_at.copy()),
            **{
                f"{_ROW}{name}": torch.from_numpy(
                    np.stack([r[name] for r in self.rows])
                )
                for name in names
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "RecordedRun":
        """What ``state_dict`` returned, as a record again.

        Raises:
            ValueError: If the state is of another version, or no run's.
        """
        require_whole(state)
        later = {name: state.get(name, "") for name in LATER_TEXTS}
        run = cls(**{name: state[name] for name in (*_FACTS, *_COUNTS)}, **later)
        run.steps = state["steps"].tolist()
        run.intervals = [Settings(*row) for row in state["intervals"].tolist()]
        still_open = [Settings(*row) for row in state["open_interval"].tolist()]
        run.open_interval = still_open[0] if still_open else None
        run.observed = state["observed"].cpu().numpy().copy()
        run.observed_at = state["observed_at"].cpu().numpy().copy()
        measured = {
            key.removeprefix(_ROW): value.cpu().numpy().copy()
            for key, value in state.items()
            if key.startswith(_ROW)
        }
        run.rows = [
            {name: rows[i] for name, rows in measured.items()}
            for i in range(len(run.steps))
        ]
        return run


def _table(intervals: list[Settings]) -> Tensor:
    """Settings as float64 ``(N, 3)``."""
    return torch.tensor(intervals, dtype=torch.float64).reshape(-1, 3)


def _columns(intervals: list[Settings]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each setting's name with its float64 ``(N,)`` values."""
    return zip(Settings._fields, np.array(intervals, dtype=np.float64).T, strict=True)


def _constant(values: NDArray[Any]) -> float | NDArray[Any]:
    """One number where all are the same."""
    return float(values[0]) if (values == values[0]).all() else values
