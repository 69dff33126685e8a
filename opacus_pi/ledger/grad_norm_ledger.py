"""The ledger of a training run: its mechanism and each example's gradient norms.

The ledger stores norms and not losses, because losses at any order and noise level can
be computed from the norms: a new question needs no new training. One ledger is one run;
functions that average over runs take a list of ledgers.

>>> mechanism = NoisySGD(
...     num_steps=100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0
... )
>>> ledger = GradNormLedger(mechanism, steps=[50, 100], grad_norms=[[0.5], [3.0]])
>>> ledger.ratios()
array([[0.25],
       [0.5 ]])
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opacus_pi._frames import frame
from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, positive, require
from opacus_pi.files.arrays_file import check_file, read_array, read_columns
from opacus_pi.files.kinds import GRAD_NORM_LEDGER
from opacus_pi.ledger.checks import (
    checked_custody,
    checked_ids,
    checked_measurements,
    checked_participations,
    checked_steps,
    checked_weights,
)
from opacus_pi.ledger.custody import Custody
from opacus_pi.ledger.gap_filling import fill_by_rank, fill_unobserved
from opacus_pi.ledger.mechanism import SCHEDULED, NoisySGD
from opacus_pi.ledger.noise_generator import checked_noise_generator
from opacus_pi.ledger.same_data import difference, same_data_set
from opacus_pi.ledger.saving import LedgerFile, SavedLedger
from opacus_pi.ledger.smoothed_ranks import SmoothedRanks, sampling_step

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "GradNormLedger",
    "columns_of",
    "filled_by_rank",
    "joint_mechanism",
    "require_alike",
    "require_ledgers",
    "runs_of",
]

_SHAPE_REMEDIES = {
    "example_ids": "Pass one id for each column of grad_norms.",
    **dict.fromkeys(SCHEDULED, "Pass one number, or one for each row of grad_norms."),
}
_PART_SAVED = (
    "You are saving a ledger of only some of the examples. The norms of an example in "
    "updates that did not draw it are estimated from the norms of all examples. The "
    "file lacks these, so the loaded ledger will give other estimates than this one. "
    "Save the whole ledger, and take the subset after loading."
)
_MEASURED = ("grad_norms", "confidences", "errors", "correct")


@dataclass(frozen=True, eq=False, repr=False)
class GradNormLedger(SavedLedger):
    """Per-example gradient norms of one training run.

    Args:
        mechanism: Number of updates, sample rate, noise and clip norm of the run.
        steps: int64 ``(N,)``, strictly increasing: updates done when each row was
            measured. Row i holds norms at the weights after ``steps[i]`` updates.
        grad_norms: float32 ``(N, n)``, the raw L2 norm of the gradient of each
            example's own loss, before clipping. NaN: not observed.
        source: ``"swept"`` (all examples measured at ``steps[i]``) or ``"observed"``
            (each example's latest norm in training since the row before).
        example_ids: int64 ``(n,)``, the position in the data set of each column's
            example. Default: column j is example j.
        data_set: The data set's ``fingerprint``, or a name of your own.
        confidences: float32 ``(N, n)``, softmax probability of the label.
        errors: float32 ``(N, n)``, norm of (softmax - one-hot label), EL2N.
        correct: float32 ``(N, n)``, 1 where the prediction was right, else 0.
        weights: Hash of the weights after the last update, ``"sha256:…"`` of the
            model's state dict. ``"changed"``: the weights were changed before their
            hash was computed. None: not known. An engine's ledger has the hash.
        custody: What is known about how the norms came to be; functions of the ledger
            refuse to give numbers if a link of it is broken. None: the maker of the
            ledger declares that every link holds.
        participations: int32 ``(N, n)``, the number of updates that drew each example,
            among those since the row before (for the last row also those after it).
            Only under fixed sampling; None: not counted.
        noise_generator: The kind of random generator that the noise was drawn from:
            ``"secure"``, ``"passed"`` or ``"global"``
            (``ledger.noise_generator.NOISE_GENERATORS``). None: not recorded.

    A ledger is sensitive: it shows which examples are unusual. Protect it like the
    data set.

    Raises:
        ValueError: If shapes disagree, steps do not increase within the run, or a norm
            is infinite or negative.
    """

    _note: ClassVar[str] = "sensitive: it shows which examples are unusual"
    _FILE: ClassVar[LedgerFile] = LedgerFile(
        GRAD_NORM_LEDGER,
        arrays={"steps": "<i8", "grad_norms": "<f4"},
        texts={"source": "source"},
        more_arrays={
            "example_ids": "<i8",
            "participations": "<i4",
            **dict.fromkeys(_MEASURED[1:], "<f4"),
        },
        more_texts={
            "data_set": "data_set",
            "weights": "weights",
            "noise_generator": "noise_generator",
        },
        objects={"custody": Custody},
        retired=("norms",),
    )

    mechanism: NoisySGD
    steps: NDArray[np.int64]
    grad_norms: NDArray[np.float32]
    source: str = field(default="swept", kw_only=True)
    example_ids: NDArray[np.int64] | None = field(default=None, kw_only=True)
    data_set: str | None = field(default=None, kw_only=True)
    confidences: NDArray[np.float32] | None = field(default=None, kw_only=True)
    errors: NDArray[np.float32] | None = field(default=None, kw_only=True)
    correct: NDArray[np.float32] | None = field(default=None, kw_only=True)
    weights: str | None = field(default=None, kw_only=True)
    custody: Custody | None = field(default=None, kw_only=True)
    participations: NDArray[np.int32] | None = field(default=None, kw_only=True)
    noise_generator: str | None = field(default=None, kw_only=True)
    _learnt: list[SmoothedRanks] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        steps = checked_steps(self.steps, self.mechanism.num_steps)
        object.__setattr__(self, "steps", steps)
        for name in _MEASURED:
            if getattr(self, name) is not None:
                measured = checked_measurements(name, getattr(self, name), len(steps))
                object.__setattr__(self, name, measured)
        expect(
            self.source in ("swept", "observed"),
            "source",
            repr(self.source),
            'must be "swept" or "observed"',
            'Pass "swept" for norms measured by a pass over the data set, "observed" '
            "for norms measured during training.",
        )
        if self.example_ids is not None:
            object.__setattr__(self, "example_ids", checked_ids(self.example_ids))
        checked_weights(self.weights)
        checked_custody(self.custody)
        checked_noise_generator(self.noise_generator)
        if self.participations is not None:
            most = self.mechanism.max_participations
            counts = checked_participations(
                self.participations,
                sampling=self.mechanism.sampling,
                limit=self.mechanism.num_steps if most is None else most,
            )
            object.__setattr__(self, "participations", counts)
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Refuse arrays that do not fit ``grad_norms`` and ``steps``."""
        num_rows, num_examples = self.grad_norms.shape
        wanted: dict[str, tuple[int, ...]] = {
            name: (num_rows, num_examples) for name in _MEASURED
        }
        wanted["participations"] = (num_rows, num_examples)
        wanted["example_ids"] = (num_examples,)
        given = {name: getattr(self, name) for name in wanted}
        for name in SCHEDULED:
            value = getattr(self.mechanism, name)
            if isinstance(value, np.ndarray):
                given[name], wanted[name] = value, (num_rows,)
        for name, value in given.items():
            shape = wanted[name]
            expect(
                value is None or value.shape == shape,
                name,
                f"an array of shape {getattr(value, 'shape', None)}",
                f"must have shape {shape}",
                _SHAPE_REMEDIES.get(
                    name, "Pass one row for each step and one column for each example."
                ),
            )

    def _shown(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "num_examples": self.num_examples,
            "source": self.source,
            **self.mechanism._shown(),
            "data_set": self.data_set,
            "noise_generator": self.noise_generator,
            "custody": "declared" if self.custody is None else self.custody.summary,
        }

    @property
    def num_rows(self) -> int:
        """Number of rows, N."""
        return len(self.grad_norms)

    @property
    def num_examples(self) -> int:
        """Number of examples, n."""
        result: int = self.grad_norms.shape[1]
        return result

    @property
    def smoothed_ranks(self) -> SmoothedRanks:
        """The ranks of norms, smoothed over all draws of the run.

        Fitted when first needed; a ``subset`` keeps the ranks that were fitted to the
        whole ledger.
        """
        if not self._learnt:
            rows = self.grad_norms
            if self.source != "swept":
                # In a row without gaps, charged examples may not have been drawn.
                has_gaps = np.isnan(rows).any(axis=1, keepdims=True)
                rows = np.where(has_gaps, rows, np.nan)
            learnt = SmoothedRanks.learnt_from(rows, self.updates_of_rows())
            self._learnt.append(learnt)
        return self._learnt[0]

    def updates_of_rows(self) -> NDArray[np.int64]:
        """Return how many updates each row stands for, int64 ``(N,)``.

        A row stands for the updates since the row before, the last row also for those
        that follow it.
        """
        ends = np.append(self.steps[:-1], self.mechanism.num_steps)
        return np.maximum(np.diff(ends, prepend=0), 1)

    def ratios(self) -> NDArray[np.float64]:
        """Return each example's clipped gradient norm in units of the noise.

        r = min(‖g‖, C) / noise_std. Gaps are filled by ``fill_unobserved``; examples
        that were never observed get C.

        Returns:
            float64 ``(N, n)``, dimensionless; ``inf`` only for an example never
            observed in a run without clipping.

        Raises:
            ValueError: If ``noise_std`` is 0.
        """
        return self.mechanism.ratios(fill_unobserved(self.grad_norms))

    def with_noise_std(self, noise_std: ArrayLike) -> "GradNormLedger":
        """Return the same norms under another, assumed noise level.

        Args:
            noise_std: Standard deviation of the noise on the sum of the gradients, a
                number or ``(N,)``.

        Returns:
            A ledger with the same norms and ``mechanism.assumed_noise`` set. Its losses
            rank examples, but no guarantee of the run follows from them.
        """
        other = replace(self, mechanism=self.mechanism.with_noise_std(noise_std))
        return other._with_learnt_of(self)

    def subset(self, indices: ArrayLike) -> "GradNormLedger":
        """Return the ledger of some of the examples, in the given order.

        Args:
            indices: int ``(m,)``, columns of this ledger, each once.

        Returns:
            A ledger of m examples, with their ``example_ids``.
        """
        distinct_indices("indices", indices, self.num_examples)
        columns = np.asarray(indices, dtype=np.int64)
        ids = columns if self.example_ids is None else self.example_ids[columns]
        rows = {name: getattr(self, name) for name in (*_MEASURED, "participations")}
        kept = {name: a[:, columns] for name, a in rows.items() if a is not None}
        if np.isnan(self.grad_norms).any():
            self.smoothed_ranks  # noqa: B018  (learns from the whole ledger)
        return replace(self, example_ids=ids, **kept)._with_learnt_of(self)

    def _with_learnt_of(self, other: "GradNormLedger") -> "GradNormLedger":
        """Take over the fitted ranks of another ledger, and return this ledger."""
        self._learnt[:] = other._learnt
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger to one safetensors file, atomically and with a checksum.

        Warns if this is a ``subset`` with gaps: the file does not hold the ranks that
        were fitted to the whole ledger, so the loaded ledger gives other estimates.

        Args:
            path: The file's name. The file is as sensitive as the ledger.
        """
        if self._learnt and self._learnt[0].num_examples != self.num_examples:
            warnings.warn(_PART_SAVED, stacklevel=2)
        super().save(path)

    def to_frame(self) -> "pd.DataFrame":
        """Return the measurements as a data frame of pandas, for your own analysis.

        Returns:
            One line for each row and example: ``step``, ``example`` (its position in
            the data set), ``grad_norm`` (NaN: not observed), and one column for each
            other measurement. It is as sensitive as the ledger.

        Raises:
            ImportError: If pandas is not installed.
        """
        names = {
            "grad_norms": "grad_norm",
            "confidences": "confidence",
            "errors": "error",
            "correct": "correct",
            "participations": "participations",
        }
        measured = {to: getattr(self, name) for name, to in names.items()}
        return frame(
            {
                "step": np.repeat(self.steps, self.num_examples),
                "example": np.tile(_columns(self), self.num_rows),
                **{k: a.ravel() for k, a in measured.items() if a is not None},
            }
        )

    def require_intact(self) -> None:
        """Refuse to give numbers if a link of the chain of custody is broken.

        Raises:
            AccountingError: If a link is broken; the message says why, and what to do.
        """
        if self.custody is not None:
            self.custody.require_intact()

    def require_data_set(self, data_set: str) -> None:
        """Refuse a ledger that was recorded on another data set.

        Args:
            data_set: The fingerprint (or name) of the data set at hand.

        Raises:
            ValueError: If this ledger was recorded on another one. A ledger without a
                fingerprint passes.
        """
        differs = "" if self.data_set is None else difference(self.data_set, data_set)
        expect(
            not differs,
            "data_set",
            data_set,
            f"must be the ledger's data set, {self.data_set}",
            f"They differ in {differs}. Pass the data set of the training, in its "
            "order, or the ledger that was recorded on this data set.",
        )

    @classmethod
    def load_chunks(
        cls, path: str | os.PathLike[str], num_examples: int = 1 << 14
    ) -> Iterator["GradNormLedger"]:
        """Read a ledger that ``save`` wrote, some examples at a time.

        For ledgers larger than memory. The ``smoothed_ranks``, which need all draws of
        the run, are fitted first, so that a part gives the same losses as the whole.

        Args:
            path: The file's name; it must not change meanwhile.
            num_examples: Examples of each part; the last may have fewer.

        Yields:
            Ledgers of consecutive examples, with their ``example_ids``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: As ``load``, or if ``num_examples`` is not above 0.
        """
        positive(
            num_examples=num_examples,
            remedy=("Pass the number of examples of each part."),
        )
        shapes, facts = check_file(path, cls._FILE.kind, cls._FILE.layout)
        _check_same_width(path, shapes)
        if "example_ids" in shapes:
            checked_ids(read_array(path, "example_ids"))
        total = shapes["grad_norms"][1]
        sampled = slice(0, total, sampling_step(total))
        names = (*_MEASURED, "participations", "example_ids")
        sample = cls._from_file(read_columns(path, sampled, names), facts)
        for start in range(0, total, num_examples):
            part = slice(start, min(start + num_examples, total))
            arrays = read_columns(path, part, names)
            arrays.setdefault("example_ids", np.arange(part.start, part.stop))
            if np.isnan(sample.grad_norms).any():
                sample.smoothed_ranks  # noqa: B018  (learns once)
            yield cls._from_file(arrays, facts)._with_learnt_of(sample)

    @classmethod
    def _from_file(
        cls, arrays: dict[str, NDArray[Any]], facts: dict[str, str]
    ) -> "GradNormLedger":
        expect(
            "norms" not in facts,
            "the file's norms",
            repr(facts.get("norms")),
            "must be exact",
            "An earlier release measured these norms in bfloat16, which is enough to "
            "rank examples but not to compute losses. Record the run again.",
        )
        return super()._from_file(arrays, facts)


def _check_same_width(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a file whose arrays have different numbers of rows or columns."""
    wanted = shapes["grad_norms"]
    rows = (*_MEASURED, "participations")
    given = {s for name, s in shapes.items() if name in rows}
    ids = shapes.get("example_ids", wanted[-1:])
    expect(
        len(wanted) == 2 and given == {wanted} and ids == wanted[1:],
        "path",
        f"arrays of shapes {sorted(given)} and ids of shape {ids} in {os.fspath(path)}",
        "must contain arrays of one shape (N, n), and n ids",
        "Write the file again, or restore it from a copy.",
    )


def filled_by_rank(ledger: GradNormLedger) -> GradNormLedger:
    r"""Return a ledger whose gaps are filled by the ranks of the examples.

    An example that was not drawn since the row before keeps its rank u among the drawn
    examples, and gets the u-quantile of the norms observed in the row. By default an
    example gets its own next norm. Compared with this default, the largest
    underestimate of a loss was 16 to 5,000 times smaller in
    ``benchmarks.observed_vs_exact``, and the largest overestimate about the same. This
    is an estimate, never a bound. Unlike with the default rule, an example's loss
    depends on the norms of others: fill the whole ledger before you take a ``subset``.

    Args:
        ledger: A ledger of all examples of the run.

    Returns:
        A ledger with filled rows. Gaps remain only for examples that were never
        observed, and in rows without any observation.
    """
    with np.errstate(over="ignore"):
        filled = fill_by_rank(ledger.grad_norms).astype(np.float32)
    return replace(ledger, grad_norms=filled)


def require_ledgers(
    ledgers: "GradNormLedger | Sequence[GradNormLedger]",
) -> tuple[GradNormLedger, ...]:
    """Return one ledger, or several, as a tuple of nothing else.

    Args:
        ledgers: The ledgers; whether they belong together is not checked.

    Raises:
        ValueError: If something is not a ledger.
    """
    runs: tuple[Any, ...] = (ledgers,)
    if isinstance(ledgers, Iterable) and not isinstance(ledgers, str | Mapping):
        runs = tuple(ledgers)
    for run in runs:
        expect(
            isinstance(run, GradNormLedger),
            "ledger",
            f"a {type(run).__name__}",
            "must be a GradNormLedger, or a list of them",
            "Pass engine.ledger, or load one by GradNormLedger.load(path).",
        )
    return runs


def runs_of(
    ledgers: "GradNormLedger | Sequence[GradNormLedger]", *, same_steps: bool = True
) -> tuple[GradNormLedger, ...]:
    """Return one ledger, or several independent runs, as a checked tuple.

    Args:
        ledgers: The runs.
        same_steps: Whether their rows must have been recorded at the same steps.

    Raises:
        ValueError: If there is no ledger, or the runs differ in mechanism, steps,
            examples or data set.
        AccountingError: If a link of a run's chain of custody is broken.
    """
    runs = require_ledgers(ledgers)
    for run in runs:
        run.require_intact()
    expect(
        len(runs) > 0, "ledger", "[]", "must contain a run", "Pass at least one ledger."
    )
    require_alike(runs, same_steps=same_steps)
    return runs


def require_alike(runs: Sequence[GradNormLedger], *, same_steps: bool = True) -> None:
    """Refuse runs that are not of one training procedure.

    Args:
        runs: The runs, whether or not their chains of custody are intact.
        same_steps: Whether their rows must have been recorded at the same steps.

    Raises:
        ValueError: If the runs differ in mechanism, steps, examples or data set.
    """
    for number, run in enumerate(runs[1:], start=1):
        agreement = _agreement(runs[0], run, same_steps)
        differing = [name for name, same in agreement.items() if not same]
        require(
            not differing,
            f"The runs of the ledger must have the same {', '.join(differing)}, but "
            f"run {number} differs from run 0.",
            "Average only independent runs of the same training, recorded at the same "
            "steps, over the same examples.",
        )


def _agreement(
    a: GradNormLedger, b: GradNormLedger, same_steps: bool
) -> dict[str, bool]:
    """Return for each property whether two runs agree in it."""
    return {
        "mechanism": _without_counts(a.mechanism) == _without_counts(b.mechanism),
        "steps": not same_steps or np.array_equal(a.steps, b.steps),
        "number of examples": a.num_examples == b.num_examples,
        "example_ids": np.array_equal(_columns(a), _columns(b)),
        "data_set": a.data_set is None
        or b.data_set is None
        or same_data_set(a.data_set, b.data_set),
    }


def _without_counts(mechanism: NoisySGD) -> NoisySGD:
    """Return a mechanism without the counts of participations of its run."""
    return replace(mechanism, max_participations=None)


def joint_mechanism(runs: Sequence[GradNormLedger]) -> NoisySGD:
    """Return the mechanism of several runs of one training procedure.

    Args:
        runs: What ``runs_of`` returned. They differ only in the counts of
            participations; the largest count is used.
    """
    counts = [run.mechanism.max_participations for run in runs]
    known = [count for count in counts if count is not None]
    most = max(known) if len(known) == len(counts) else None
    return replace(runs[0].mechanism, max_participations=most)


def _columns(ledger: GradNormLedger) -> NDArray[np.int64]:
    """Return the position in the data set of each column's example."""
    ids = ledger.example_ids
    return np.arange(ledger.num_examples) if ids is None else ids


def columns_of(
    ledger: GradNormLedger, indices: ArrayLike, name: str = "forget_indices"
) -> NDArray[np.int64]:
    """Return the columns in which the ledger holds given examples of the data set.

    Args:
        ledger: The ledger.
        indices: int ``(m,)``, positions in the data set.
        name: The argument's name, for the error.

    Raises:
        ValueError: If the ledger has no column for one of them.
    """
    known = _columns(ledger)
    missing = np.setdiff1d(indices, known)
    expect(
        len(missing) == 0,
        name,
        missing[:1],
        "must be examples of the ledger",
        "Pass positions in the data set for which the ledger has a column.",
    )
    order = np.argsort(known)
    return order[np.searchsorted(known, indices, sorter=order)]
