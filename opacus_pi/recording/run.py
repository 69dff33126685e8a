"""The record of an unfinished run: rows, update intervals, waiting reports.

A row holds what was measured of every example after one update. The update interval of
a row consists of the updates since the row before; the run keeps the settings of each.
 ``RecordedRun`` does not decide when a row is written: the recorder does.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect
from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.custody.seen_blocks import SeenBlocks
from opacus_pi.custody.seen_states import SeenStates
from opacus_pi.ledger.custody import MAX_UNATTRIBUTED, Custody
from opacus_pi.ledger.noise_generator import weakest
from opacus_pi.ledger.run_identity import row_hash
from opacus_pi.ledger.same_data import (
    same_data_set,
    same_transforms,
    without_transforms,
)
from opacus_pi.recording.participations import Participations
from opacus_pi.recording.saved_state import (
    ASSUMED,
    FLAGS,
    GENERATOR_STATES,
    LATER_TEXTS,
    UNDONE,
    VERSION,
    require_whole,
)
from opacus_pi.recording.schedule import Every, num_due

_FACTS = ("source", "num_examples", "sample_rate", "sampling", "data_set")
_COUNTS = ("num_steps", "refusal")
Indices = Tensor | NDArray[np.int64] | Sequence[int]

_OTHER_TRANSFORMS = (
    "The data set has other transforms than when the saved run was recorded. Training "
    "and recording go on, and the norms are those of the examples as they are now. The "
    "ledger no longer says which transforms the run used, so a rewind lists them as "
    "declared. Resume with the transforms of the saved run if this was not intended."
)
_UNDONE = (
    "A checkpoint was loaded after later updates had been made: {num_undone} updates "
    "are not counted. If their models or results decided that it was loaded, as a "
    "worse validation loss does, or if they were released, they belong to ε: then all "
    "{num_made} updates must be counted, not {num_steps}."
)
_MAX_WAITING = 256  # reports that are added to the run together
_ROW = "rows."  # before the names of measurements in a saved state


class UpdateSettings(NamedTuple):
    """The settings of one update, or of every update of an update interval.

    Args:
        noise_std: Standard deviation of the noise on the sum of the gradients.
        max_grad_norm: The clip norm; ``inf`` without clipping.
        sample_rate: Probability that an example is drawn.
    """

    noise_std: float
    max_grad_norm: float
    sample_rate: float

    def widened(self, other: "UpdateSettings") -> "UpdateSettings":
        """Return settings no safer than either: least noise, largest of the others.

        A loss never decreases in ``max_grad_norm`` or ``sample_rate`` and never
        increases in ``noise_std``, so no update of the interval is charged too little.
        """
        return UpdateSettings(
            min(self.noise_std, other.noise_std),
            max(self.max_grad_norm, other.max_grad_norm),
            max(self.sample_rate, other.sample_rate),
        )


# of an interval without updates; widening it by other settings gives the others
_NO_UPDATE = UpdateSettings(math.inf, 0.0, 0.0)


@dataclass
class RecordedRun:
    """The record of one training run so far; ``ledger`` makes a ledger of it.

    Args:
        source: ``"observed"`` or ``"swept"``.
        num_examples: Number of examples, n.
        sample_rate: Sample rate that the run was announced with.
        sampling: ``"poisson"`` or ``"fixed"``.
        data_set: Fingerprint of the data set.
        num_steps: Updates counted so far.
        refusal: Why the run has no ledger; empty if it has one.
        num_undone: Updates that are not counted, because a checkpoint of before them
            was loaded.
        weights: Hash of the weights after the last update, if it was computed.
        custody: The chain of custody as JSON, as it was saved; empty if there is none.
        run_name: Name of the run in the files of its checkpoints; empty if it has none.
        noise_generator: The weakest kind of generator that noise was drawn from; empty
            if it is not known for every update.
        accountant_is: ``"too small"`` if Opacus's accountant charged an update less
            than its noise and clip norms cost.
        noise_is: ``"assumed"`` if no guarantee follows from the recorded noise of some
            update; empty if it is what training added.
        steps: Updates that were done when each row was written.
        rows: What was measured, float32 ``(n,)`` by name, for each row.
        intervals: Settings of each row's update interval.
        open_interval: Settings of the updates since the last row; None if there were
            none.
        has_unattributed: Whether the updates of each row's interval contained samples
            whose example is not known.
        open_has_unattributed: Whether those since the last row did.
    """

    source: str
    num_examples: int
    sample_rate: float
    sampling: str
    data_set: str
    num_steps: int = 0
    refusal: str = ""
    num_undone: int = 0
    weights: str = ""
    custody: str = ""
    run_name: str = ""
    noise_generator: str = ""
    noise_is: str = ""
    accountant_is: str = ""
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    intervals: list[UpdateSettings] = field(default_factory=list)
    open_interval: UpdateSettings | None = None
    has_unattributed: list[bool] = field(default_factory=list)
    open_has_unattributed: bool = False
    observed: NDArray[np.float32] = field(init=False)
    # update in which each example was observed, if the other processes do not know of
    # it yet; else 0
    observed_at: NDArray[np.int64] = field(init=False)
    # in how many updates of each interval, and of the open one, each example was; None
    # if that was not counted from the first update on
    participations: Participations | None = field(init=False)
    # of the generator that the noise of each update was drawn from
    generator_states: SeenStates = field(default_factory=SeenStates, compare=False)
    generator_blocks: SeenBlocks = field(default_factory=SeenBlocks, compare=False)

    def __post_init__(self) -> None:
        self.num_examples = int(self.num_examples)
        self.sample_rate = float(self.sample_rate)
        is_fixed = self.sampling == "fixed"
        self.participations = Participations(self.num_examples) if is_fixed else None
        self._forget_observations()

    @property
    def num_made(self) -> int:
        """Number of updates that were made, with those that were undone."""
        return self.num_steps + self.num_undone

    @property
    def undone(self) -> str:
        """Why updates that were undone may matter, in sentences; empty if none were."""
        if not self.num_undone:
            return ""
        numbers = {n: getattr(self, n) for n in ("num_undone", "num_made", "num_steps")}
        return _UNDONE.format(**numbers)

    def _forget_observations(self) -> None:
        """Start a row in which no example has been observed."""
        size = self.num_examples if self.source == "observed" else 0
        self.observed = np.full(size, np.nan, dtype=np.float32)
        self.observed_at = np.zeros(size, dtype=np.int64)

    @property
    def num_unmerged(self) -> int:
        """Number of examples whose observation other processes do not know."""
        return int(np.count_nonzero(self.observed_at))

    def require_examples(self, indices: NDArray[np.int64]) -> None:
        """Refuse positions outside the data set.

        Args:
            indices: int64 ``(b,)``.

        Raises:
            ValueError: If an index is outside ``[0, num_examples)``.
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
                "Report positions in the data set of the training.",
            )

    def observe(
        self,
        indices: NDArray[np.int64],
        norms: NDArray[np.float32],
        *,
        steps: int | NDArray[np.int64],
    ) -> None:
        """Store norms as the latest observations of their examples.

        Args:
            indices: int64 ``(b,)``; if an example occurs twice, the later norm stays.
            norms: float32 ``(b,)``.
            steps: In which update each was observed, from 1.

        Raises:
            ValueError: If an index is outside ``[0, num_examples)``.
        """
        self.require_examples(indices)
        self.observed[indices] = norms  # numpy: of equal indices the last one stays
        self.observed_at[indices] = steps

    def count_step(
        self,
        noise_std: float,
        max_grad_norm: float,
        sample_rate: float,
        noise_generator: str | None = None,
    ) -> None:
        """Count one update.

        Args:
            noise_std: As for ``UpdateSettings``.
            max_grad_norm: As for ``UpdateSettings``.
            sample_rate: As for ``UpdateSettings``.
            noise_generator: The kind of generator of its noise; None: not known.
        """
        if self.num_steps and self.noise_generator != noise_generator:
            kinds = (self.noise_generator or None, noise_generator)
            noise_generator = weakest(*kinds)
        self.noise_generator = noise_generator or ""
        self.num_steps += 1
        self.weights = ""
        interval, settings = self.open_interval, (noise_std, max_grad_norm, sample_rate)
        if interval != settings:  # as the tuples that they are
            new = UpdateSettings(*settings)
            self.open_interval = interval.widened(new) if interval else new

    def row_is_due(self, every: Every) -> bool:
        """Return whether more rows are due now than when the last one was written.

        Args:
            every: The recorder's option.
        """
        last, rate = self.steps[-1] if self.steps else 0, self.sample_rate
        then = num_due(last, every=every, sample_rate=rate)
        return num_due(self.num_steps, every=every, sample_rate=rate) > then

    def close_row(self, row: dict[str, NDArray[np.float32]]) -> None:
        """Add a row for the current weights, and start the next update interval.

        Args:
            row: float32 ``(n,)`` by name.
        """
        self.steps.append(self.num_steps)
        self.rows.append(row)
        self.intervals.append(self.open_interval or _NO_UPDATE)
        self.open_interval = None
        self.has_unattributed.append(self.open_has_unattributed)
        self.open_has_unattributed = False
        if self.participations is not None:
            self.participations.close_row()
        self._forget_observations()

    def note_unattributed(self) -> None:
        """Record that the next update contains unattributed samples."""
        self.open_has_unattributed = True
        if self.participations is not None:
            self.participations.num_unknown_updates += 1

    def ledger(
        self, custody: Custody | None = None, *, fills_unattributed: bool = False
    ) -> GradNormLedger:
        """Return what was recorded up to now as a new ledger.

        Args:
            custody: The chain of custody of the norms.
            fills_unattributed: Whether examples that were not observed get the clip
                norm in rows with samples whose example is not known.

        Raises:
            AccountingError: If nothing has been recorded.
        """
        steps, rows, intervals = self._rows_until_now()
        if self.num_steps == 0:
            raise AccountingError(
                "Nothing was recorded yet, because no update was made. Train with the "
                "model, optimizer and loader that the engine returned."
            )
        if not rows:
            raise AccountingError(
                f"No row was recorded yet (updates so far: {self.num_steps}). Continue "
                "the training, or record more often: Recorder(every=...) counts in "
                "epochs."
            )
        facts: dict[str, Any] = {n: _constant(v) for n, v in _columns(intervals)}
        counted, counts = self.participations, None
        if counted is not None and counted.were_reported:
            counts = counted.by_row(len(steps))
            facts["max_participations"] = min(counted.largest(counts), self.num_steps)
            if counted.num_unknown_updates > MAX_UNATTRIBUTED * self.num_steps:
                counts = None  # too many are missing for a value of one example
        mechanism = NoisySGD(
            num_steps=self.num_steps,
            sampling=self.sampling,
            assumed_noise=self.noise_is == ASSUMED,
            **facts,
        )
        measured: dict[str, Any] = {
            name: np.stack([row[name] for row in rows]) for name in rows[0]
        }
        if fills_unattributed and self.source == "observed":
            flags = self._rows_with_unattributed()
            whole = zip(measured["grad_norms"], flags, intervals, strict=True)
            measured["grad_norms"] = np.stack([_charged(*row) for row in whole])
        return GradNormLedger(
            mechanism,
            np.array(steps, dtype=np.int64),
            source=self.source,
            data_set=self.data_set,
            weights=self.weights or None,
            custody=custody,
            participations=counts,
            noise_generator=self.noise_generator or None,
            **measured,
        )

    def row_hashes(self, *, fills_unattributed: bool = False) -> dict[int, str]:
        """Return the hash of each row that was written, as the ledger has it.

        Args:
            fills_unattributed: As for ``ledger``.

        Returns:
            ``row_hash`` of the norms, by the number of updates that were done.
        """
        fills = fills_unattributed and self.source == "observed"
        rows = zip(self.rows, self.has_unattributed, self.intervals, strict=True)
        hashes = (
            row_hash(_charged(row["grad_norms"], fills and flag, interval))
            for row, flag, interval in rows
        )
        return dict(zip(self.steps, hashes, strict=True))

    def hash_of_next_row(
        self, row: dict[str, NDArray[np.float32]], *, fills_unattributed: bool = False
    ) -> str:
        """Return the hash that a row will have in ``row_hashes`` once it is closed.

        Args:
            row: As for ``close_row``.
            fills_unattributed: As for ``ledger``.
        """
        fills = fills_unattributed and self.source == "observed"
        flag, interval = self.open_has_unattributed, self.open_interval or _NO_UPDATE
        return row_hash(_charged(row["grad_norms"], fills and flag, interval))

    def _rows_with_unattributed(self) -> list[bool]:
        """Return for each row of the ledger whether it has unattributed samples."""
        flags = list(self.has_unattributed)
        return [*flags, self.open_has_unattributed] if self.open_interval else flags

    def _rows_until_now(
        self,
    ) -> tuple[list[int], list[dict[str, NDArray[np.float32]]], list[UpdateSettings]]:
        """Return steps, rows and update intervals, the updates since the last row too.

        The norms observed in these updates are one more row. A swept run has measured
        nothing since its last row, so that row's interval is widened instead.
        """
        steps, rows, intervals = list(self.steps), list(self.rows), list(self.intervals)
        if self.open_interval and self.source == "observed":
            steps.append(self.num_steps)
            rows.append({"grad_norms": self.observed})
            intervals.append(self.open_interval)
        elif self.open_interval and rows:
            intervals[-1] = intervals[-1].widened(self.open_interval)
        if len(rows) > 1 and intervals[0] == _NO_UPDATE:
            # a row before the first update: no update is charged by it
            intervals[0] = intervals[1]
        return steps, rows, intervals

    def require_same(self, other: "RecordedRun") -> None:
        """Refuse to continue one run as another.

        Args:
            other: The run that is about to begin.

        Warns if the data set has other transforms now. Recording goes on, and the run
        does not name its transforms any more.

        Raises:
            ValueError: If what was recorded, the data set or the sampling differ.
        """
        for name in _FACTS:
            ours, others = getattr(self, name), getattr(other, name)
            is_data_set = name == "data_set"
            expect(
                same_data_set(ours, others) if is_data_set else ours == others,
                f"the saved run's {name}",
                repr(ours),
                f"must equal that of the run that resumes it, {others!r}",
                "Resume with the data set, sampling and Recorder of the saved run.",
            )
        if same_transforms(self.data_set, other.data_set) is False:
            warnings.warn(_OTHER_TRANSFORMS, stacklevel=2)
            self.data_set = without_transforms(self.data_set)

    def state_dict(self) -> dict[str, Any]:
        """Return everything recorded, as tensors, numbers and strings."""
        still_open = [self.open_interval] if self.open_interval else []
        names = self.rows[0] if self.rows else ()
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in (*_FACTS, *_COUNTS, *LATER_TEXTS)},
            **({UNDONE: self.num_undone} if self.num_undone else {}),
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "intervals": _table(self.intervals),
            "open_interval": _table(still_open),
            "observed": torch.from_numpy(self.observed.copy()),
            "observed_at": torch.from_numpy(self.observed_at.copy()),
            FLAGS: torch.tensor(
                [*self.has_unattributed, self.open_has_unattributed], dtype=torch.int64
            ),
            GENERATOR_STATES: self.generator_states.state(),
            **({} if self.participations is None else self.participations.state_dict()),
            **{
                f"{_ROW}{name}": torch.from_numpy(
                    np.stack([r[name] for r in self.rows])
                )
                for name in names
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "RecordedRun":
        """Return the run that ``state_dict`` saved.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If the state is of another version, or no run can have saved it.
        """
        require_whole(state)
        later = {name: state.get(name, "") for name in LATER_TEXTS}
        run = cls(**{name: state[name] for name in (*_FACTS, *_COUNTS)}, **later)
        run.num_undone = state.get(UNDONE, 0)
        run.steps = state["steps"].tolist()
        run.intervals = [UpdateSettings(*row) for row in state["intervals"].tolist()]
        still_open = [UpdateSettings(*row) for row in state["open_interval"].tolist()]
        run.open_interval = still_open[0] if still_open else None
        run.observed = state["observed"].cpu().numpy().copy()
        run.observed_at = state["observed_at"].cpu().numpy().copy()
        if FLAGS in state:
            *run.has_unattributed, run.open_has_unattributed = map(
                bool, state[FLAGS].tolist()
            )
        else:
            run.has_unattributed = [False] * len(run.steps)
        if GENERATOR_STATES in state:
            run.generator_states = SeenStates.from_state(state[GENERATOR_STATES])
        if run.participations is not None:
            run.participations = Participations.from_state_dict(state)
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


def _charged(
    norms: NDArray[np.float32], has_unattributed: bool, interval: UpdateSettings
) -> NDArray[np.float32]:
    """Return the norms of a row, with the clip norm where none was observed.

    Args:
        norms: float32 ``(n,)``, NaN where none was observed.
        has_unattributed: Whether these examples may have been in the interval's
            updates, so that they get the clip norm.
        interval: Settings of the row's update interval.
    """
    if not has_unattributed:
        return norms
    return np.where(np.isnan(norms), np.float32(interval.max_grad_norm), norms)


def _table(intervals: list[UpdateSettings]) -> Tensor:
    """Return settings as float64 ``(N, 3)``."""
    return torch.tensor(intervals, dtype=torch.float64).reshape(-1, 3)


def _columns(intervals: list[UpdateSettings]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield each setting's name and its float64 ``(N,)`` values."""
    return zip(
        UpdateSettings._fields, np.array(intervals, dtype=np.float64).T, strict=True
    )


def _constant(values: NDArray[Any]) -> float | NDArray[Any]:
    """Return one number where all are the same."""
    return float(values[0]) if (values == values[0]).all() else values


class WaitingReports:
    """Reported norms that are not yet added to the run.

    Much of the cost of a report does not depend on its size, and waiting for norms that
    are on an accelerator stops the training. So reports are collected as they come, on
    whatever device they are, and added to the run many at once.

    >>> reports = WaitingReports()
    >>> reports.add(torch.tensor([1, 0]), torch.tensor([0.5, 0.25]), step=3)
    >>> reports.add(torch.tensor([2]), torch.tensor([1.0]), step=4)
    >>> [values.tolist() for values in reports.take()]
    [[1, 0, 2], [0.5, 0.25, 1.0], [3, 3, 4]]
    """

    def __init__(self) -> None:
        self._reports: list[tuple[Indices, Tensor, int]] = []

    @property
    def are_many(self) -> bool:
        """Return whether it is time to add them to the run."""
        return len(self._reports) >= _MAX_WAITING

    def add(self, indices: Indices, norms: Tensor, *, step: int) -> None:
        """Keep a report, without copying it.

        Args:
            indices: ``(b,)``, which examples enter the update.
            norms: float ``(b,)``, their gradient norms.
            step: Number of the update, from 1.
        """
        self._reports.append((indices, norms, step))

    def take(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return and drop all waiting reports, in the order of reporting.

        Returns:
            int64 indices, float32 norms and int64 updates, each ``(k,)`` on the CPU;
            None if nothing waits.
        """
        if not self._reports:
            return None
        indices, norms, steps = zip(*self._reports, strict=True)
        self._reports = []
        lengths = torch.tensor([len(i) for i in indices])
        return (
            torch.cat([torch.as_tensor(i, dtype=torch.int64).cpu() for i in indices]),
            torch.cat([n.to(torch.float32) for n in norms]).cpu(),
            torch.tensor(steps).repeat_interleave(lengths),
        )
