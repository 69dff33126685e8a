"""Record of the examples in each update, with their gradient norms.

A ledger keeps a few rows of norms. A rewind needs more: the update in which an example
was drawn first, and for a deletion policy every update that it was in. This record
holds all of it, twelve bytes for each sample of each batch. It is written block by
block while the training runs (``recording.checkpoints``) and joined when it is read.

It is as sensitive as the training data: it says when each example was used, and how
unusual it was.

>>> record = ParticipationRecord(
...     num_examples=3,
...     sampling="poisson",
...     sample_rate=0.5,
...     data_set="toy",
...     run="a",
...     steps=[1, 1, 3],
...     indices=[0, 2, 0],
...     norms=[0.5, 2.0, 0.25],
...     noise_std=[1.0, 1.0, 1.0],
...     max_grad_norm=[1.0, 1.0, 1.0],
...     sample_rates=[0.5, 0.5, 0.5],
...     num_unattributed=[0, 0, 0],
... )
>>> record.first_updates()
array([1, 4, 1])
>>> record.batch(3)
array([0], dtype=int32)
"""

from __future__ import annotations  # help shows NDArray[np.int32], not all of it

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect

__all__ = ["ParticipationRecord"]

_REMEDY = (
    "Do not make this record by hand: use the one that the Recorder wrote during "
    "training."
)
_SAMPLES = {"steps": np.int32, "indices": np.int32, "norms": np.float32}
_UPDATES = {
    "noise_std": np.float64,
    "max_grad_norm": np.float64,
    "sample_rates": np.float64,
    "num_unattributed": np.int64,
}


@dataclass(frozen=True, eq=False)
class ParticipationRecord:
    """Every participation of every example in one training run.

    Args:
        num_examples: Number of examples of the data set, n.
        sampling: ``"poisson"`` or ``"fixed"``.
        sample_rate: Probability with which an update draws an example, or its expected
            share of the examples under fixed sampling.
        data_set: Fingerprint of the data set.
        run: Random name of the run, the same in all of its files.
        steps: int32 ``(k,)``: the update of each sample, counted from 1; in any order.
        indices: int32 ``(k,)``: the example of each sample.
        norms: float32 ``(k,)``: its gradient norm before clipping; NaN: not measured.
        noise_std: float64 ``(T,)``: standard deviation of the noise that each update
            adds to the sum of the gradients.
        max_grad_norm: float64 ``(T,)``: clip norm of each update; ``inf``: no clipping.
        sample_rates: float64 ``(T,)``: sample rate of each update; larger than
            ``sample_rate`` where gradients of several batches were accumulated.
        num_unattributed: int64 ``(T,)``: samples of each update whose example is not
            known. Any example may be among them.
        learning_rates: float64 ``(T, G)``: learning rate of each parameter group in
            each update; None: not recorded.
        conditions: int64 ``(T,)``: a hash of what else each update depends on: which
            parameters are trained, the optimizer's options except its learning rates,
            and which modules are in evaluation mode. Negative: the user had put hooks
            on the optimizer's steps. None: not recorded.
        weights: Hash of the weights after the last update (``models.weights_name``);
            empty if not known.
        policy: The deletion policy as JSON, made before training; empty: none.
        began: When recording began, as an ISO 8601 text.
        kept: The updates after which a state of the training was saved.

    Raises:
        ValueError: If lengths differ, or an entry is outside its domain.
    """

    num_examples: int
    sampling: str
    sample_rate: float
    data_set: str
    run: str
    steps: NDArray[np.int32]
    indices: NDArray[np.int32]
    norms: NDArray[np.float32]
    noise_std: NDArray[np.float64]
    max_grad_norm: NDArray[np.float64]
    sample_rates: NDArray[np.float64]
    num_unattributed: NDArray[np.int64]
    learning_rates: NDArray[np.float64] | None = None
    conditions: NDArray[np.int64] | None = None
    weights: str = ""
    policy: str = ""
    began: str = ""
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expect(
            self.sampling in ("poisson", "fixed")
            and 0 < self.sample_rate <= 1
            and 0 < self.num_examples < 2**31,
            "the record of participations",
            f"{self.num_examples} examples, {self.sampling!r} sampling at rate "
            f"{self.sample_rate}",
            "must have at least one example, a sampling scheme and a sample rate",
            _REMEDY,
        )
        for name, dtype in {**_SAMPLES, **_UPDATES}.items():
            array: NDArray[Any] = np.asarray(getattr(self, name), dtype=dtype)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "kept", tuple(int(step) for step in self.kept))
        self._check_lengths()
        expect(
            all(0 <= step <= self.num_steps for step in self.kept),
            "kept",
            list(self.kept)[:5],
            f"must be updates of the run, in [0, {self.num_steps}]",
            _REMEDY,
        )
        self._check_ranges()

    def _check_lengths(self) -> None:
        """Refuse arrays that do not belong together."""
        for names in (_SAMPLES, _UPDATES):
            shapes = {name: getattr(self, name).shape for name in names}
            expect(
                len(set(shapes.values())) == 1
                and len(next(iter(shapes.values()))) == 1,
                "the record of participations",
                shapes,
                "must have flat arrays of the same length",
                _REMEDY,
            )
        rates = self.learning_rates
        expect(
            rates is None or (rates.ndim == 2 and len(rates) == self.num_steps),
            "learning_rates",
            None if rates is None else f"an array of shape {rates.shape}",
            f"must have one row for each of the {self.num_steps} updates",
            _REMEDY,
        )
        conditions = self.conditions
        expect(
            conditions is None or conditions.shape == (self.num_steps,),
            "conditions",
            None if conditions is None else f"an array of shape {conditions.shape}",
            f"must have one entry for each of the {self.num_steps} updates",
            _REMEDY,
        )

    def _check_ranges(self) -> None:
        """Refuse updates and examples that the run does not have."""
        for name, low, high in (
            ("steps", 1, self.num_steps),
            ("indices", 0, self.num_examples - 1),
            ("norms", 0, np.inf),
            ("noise_std", 0, np.inf),
            ("max_grad_norm", 0, np.inf),
            ("sample_rates", 0, 1),
            ("num_unattributed", 0, np.inf),
        ):
            array = getattr(self, name)
            wrong = (array < low) | (array > high)
            if name in _UPDATES:
                wrong |= np.isnan(array)
            expect(
                not wrong.any(),
                name,
                array[wrong][:1],
                f"must be in [{low}, {high:g}]",
                _REMEDY,
            )

    @property
    def num_steps(self) -> int:
        """Number of updates of the run so far, T."""
        return len(self.noise_std)

    def first_updates(self) -> NDArray[np.int64]:
        """Return the first update that may have drawn each example.

        An update with unattributed samples may have drawn any example.

        Returns:
            int64 ``(n,)``, counted from 1; T + 1 for an example that was never drawn.
        """
        first = np.full(self.num_examples, self.num_steps + 1, dtype=np.int64)
        np.minimum.at(first, self.indices, self.steps)
        unknown = np.flatnonzero(self.num_unattributed)
        return np.minimum(first, unknown[0] + 1) if unknown.size else first

    def first_change(self, start: int) -> int | None:
        """Return the first update after a state that was made under other conditions.

        Args:
            start: Number of updates after which the state was saved.

        Returns:
            The update, counted from 1; None if there is none, or nothing is known.
        """
        if self.conditions is None:
            return None
        since = self.conditions[max(0, start - 1) :]
        changed = np.flatnonzero(since != since[:1])
        return int(changed[0]) + max(1, start) if changed.size else None

    def has_step_hooks(self, start: int) -> bool:
        """Return whether hooks of the user were on the optimizer's steps.

        Args:
            start: Number of updates before those that are asked for.
        """
        conditions = self.conditions
        return conditions is not None and bool((conditions[start:] < 0).any())

    def batch(self, step: int) -> NDArray[np.int32]:
        """Return the attributed examples of one update, in the order of their samples.

        Args:
            step: The update, counted from 1.
        """
        low, high = np.searchsorted(self._steps_in_order, [step, step + 1])
        return self.indices[self._order[low:high]]

    def selected(self, examples: ArrayLike) -> NDArray[np.int64]:
        """Return the positions of the samples of some examples, in order of update.

        Args:
            examples: int ``(m,)``, positions in the data set.
        """
        chosen = np.zeros(self.num_examples, dtype=np.bool_)
        chosen[np.asarray(examples, dtype=np.int64)] = True
        return self._order[chosen[self.indices[self._order]]]

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """Positions of the samples in order of their update."""
        return np.argsort(self.steps, kind="stable")

    @cached_property
    def _steps_in_order(self) -> NDArray[np.int32]:
        """The update of each sample, increasing."""
        return self.steps[self._order]
