"""The facts of a noisy training run, in the units that its accounting needs.

Noise, clip norm and sample rate come in several conventions (noise per clip norm, on
the sum or on the mean; batch size or rate). They are converted once, when a
``NoisySGD`` is made; all later code works in its units.

>>> NoisySGD(num_steps=100, sample_rate=1.2, noise_std=1.0)
Traceback (most recent call last):
    ...
ValueError: sample_rate must be in [0, 1], got 1.2. Divide the batch size by the data set size.
"""  # noqa: E501

import operator
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive
from opacus_pi.ledger.checks import frozen

SCHEDULED = ("sample_rate", "noise_std", "max_grad_norm")
_MOST_UPDATES = 10**18  # a file stores at most 18 digits
_ASSUMED = "assumed"  # in a file
MECHANISM_ARRAYS = {f"mechanism.{name}": "<f8" for name in SCHEDULED}
MECHANISM_FACTS = ("num_steps", "sampling")
MECHANISM_MORE_FACTS = ("noise", "max_participations")
_WHOLE = "[0-9]{1,18}"


@dataclass(frozen=True, eq=False, repr=False)
class NoisySGD(Shown):
    """The facts of a noisy training run that its accounting needs.

    One update adds ``N(0, noise_std² I)`` to the sum of the batch's gradients, each
    clipped to ``max_grad_norm``.

    Args:
        num_steps: Number of updates, T.
        sample_rate: Probability that an example is in an update, in [0, 1]
            (a shuffled loader: batch size over data set size).
        noise_std: Standard deviation of the noise on the **sum** of the per-example
            gradients. Opacus: ``noise_multiplier * max_grad_norm``; for noise on the
            mean, multiply by the expected batch size. 0 is plain SGD, which has no
            finite loss.
        max_grad_norm: L2 clip norm C; ``inf`` without clipping; for per-layer clipping,
            the root of the sum of the squared clip norms.
        sampling: ``"poisson"``, or ``"fixed"`` for shuffling and any other schedule
            that does not look at the data and draws an example at most once an epoch
            (``1 / sample_rate`` updates).
        assumed_noise: Whether ``noise_std`` is an assumption, not what training added
            (``with_noise_std`` and adaptive clipping set it): losses then rank
            examples, and no guarantee follows from them.
        max_participations: Under fixed sampling, the largest number of updates that
            drew one example, as counted. None: not counted, so an example is assumed to
            be in one update of every epoch.

    ``sample_rate``, ``noise_std`` and ``max_grad_norm`` may be arrays ``(N,)`` if a
    schedule changes them: one value for the updates that each row of a ledger stands
    for.

    Raises:
        ValueError: If a value is outside its domain.
    """

    num_steps: int
    sample_rate: float | NDArray[np.float64]
    noise_std: float | NDArray[np.float64]
    max_grad_norm: float | NDArray[np.float64] = float("inf")
    sampling: str = "poisson"
    assumed_noise: bool = False
    max_participations: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", _count("num_steps", self.num_steps))
        for name in SCHEDULED:
            object.__setattr__(self, name, _scheduled(name, getattr(self, name)))
        in_range(
            0,
            1,
            sample_rate=self.sample_rate,
            remedy="Divide the batch size by the data set size.",
        )
        noise = np.asarray(self.noise_std)
        ok = (noise >= 0) & np.isfinite(noise)
        expect(
            bool(ok.all()),
            "noise_std",
            noise[~ok][:1],
            "must be at least 0 and finite",
            "Pass the standard deviation of the noise on the sum of the gradients.",
        )
        positive(
            max_grad_norm=self.max_grad_norm,
            remedy="Pass inf for training without clipping.",
        )
        expect(
            self.sampling in ("poisson", "fixed"),
            "sampling",
            repr(self.sampling),
            'must be "poisson" or "fixed"',
            'Pass "fixed" for a shuffled loader.',
        )
        if self.max_participations is not None:
            most = _count("max_participations", self.max_participations)
            object.__setattr__(self, "max_participations", most)
            expect(
                self.sampling == "fixed",
                "max_participations",
                most,
                f"must be None for sampling={self.sampling!r}",
                "Leave it out: under Poisson sampling the accounting uses the sample "
                "rate, not a count.",
            )
            expect(
                most <= self.num_steps,
                "max_participations",
                most,
                f"must be at most num_steps ({self.num_steps})",
                "Count the updates that each example was in.",
            )

    def _shown(self) -> dict[str, Any]:
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in facts.items() if value is not None}

    def __eq__(self, other: object) -> bool:
        """Return whether all facts are equal, entry by entry."""
        if not isinstance(other, NoisySGD):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
        )

    def ratios(self, norms: ArrayLike) -> NDArray[np.float64]:
        """Return clipped gradient norms in units of the noise, min(‖g‖, C) / noise_std.

        A ledger converts its norms by this function.

        Args:
            norms: ``(N, n)``, or any shape if noise and clip norm are numbers.

        Returns:
            float64 in the norms' shape, dimensionless.

        Raises:
            ValueError: If ``noise_std`` is 0.
        """
        positive(
            noise_std=self.noise_std,
            remedy="Without noise no loss is finite. Assume a noise for a ranking: "
            "ledger.with_noise_std(sigma).",
        )
        clip, noise = (
            np.reshape(fact, (-1, 1)) if np.ndim(fact) else fact
            for fact in (self.max_grad_norm, self.noise_std)
        )
        return np.minimum(norms, clip) / noise

    def with_noise_std(self, noise_std: ArrayLike) -> "NoisySGD":
        """Return the same facts with an assumed noise level, marked as assumed.

        Args:
            noise_std: Standard deviation of the noise on the sum of the gradients, a
                number or ``(N,)``.
        """
        facts: dict[str, Any] = {"noise_std": noise_std, "assumed_noise": True}
        return replace(self, **facts)

    def at_row(self, row: int) -> "NoisySGD":
        """Return the mechanism with the values that its schedules have at one row.

        Args:
            row: Index of the row.
        """
        values = {name: getattr(self, name) for name in SCHEDULED}
        here = {k: v[row] for k, v in values.items() if np.ndim(v)}
        return replace(self, **here) if here else self

    def __hash__(self) -> int:
        # arrays have no hash; equal mechanisms agree in these two facts
        return hash((self.num_steps, self.sampling))

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the numbers and the strings that a ledger's file stores.

        Returns:
            float64 arrays by name, and strings by name.
        """
        arrays = {f"mechanism.{name}": getattr(self, name) for name in SCHEDULED}
        facts = {"num_steps": str(self.num_steps), "sampling": self.sampling}
        if self.assumed_noise:
            facts["noise"] = _ASSUMED
        if self.max_participations is not None:
            facts["max_participations"] = str(self.max_participations)
        return arrays, facts

    @classmethod
    def from_arrays(
        cls, arrays: dict[str, NDArray[Any]], facts: dict[str, str]
    ) -> "NoisySGD":
        """Return the mechanism that ``to_arrays`` described.

        Args:
            arrays: All arrays of a ledger's file; the mechanism's are taken out of it.
            facts: All strings of the file.

        Raises:
            ValueError: If a text is not what ``to_arrays`` writes.
        """
        steps, noise = facts["num_steps"], facts.get("noise", _ASSUMED)
        most = facts.get("max_participations")
        remedy = "Restore the file from a copy."
        for name, text in (("num_steps", steps), ("max_participations", most or "0")):
            is_whole = re.fullmatch(_WHOLE, text) is not None
            expect(
                is_whole, f"{name} in the file", text, "must be a whole number", remedy
            )
        expect(
            noise == _ASSUMED,
            "noise in the file",
            noise,
            f"must be {_ASSUMED!r} or missing",
            remedy,
        )
        return cls(
            num_steps=int(steps),
            sampling=facts["sampling"],
            assumed_noise="noise" in facts,
            max_participations=None if most is None else int(most),
            **{name: arrays.pop(f"mechanism.{name}") for name in SCHEDULED},
        )


def _count(name: str, value: int) -> int:
    """Return a whole number that a ledger's file can hold, or refuse."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    expect(
        number >= 0,
        name,
        value,
        "must be a whole number, at least 0",
        "Pass the number of updates.",
    )
    expect(
        number < _MOST_UPDATES,
        name,
        f"a number of {number.bit_length()} bits",
        f"must be below {_MOST_UPDATES:.0e}",
        "Check the unit: num_steps counts updates of the weights.",
    )
    return number


def _scheduled(name: str, value: ArrayLike) -> float | NDArray[np.float64]:
    """Return a float, or a read-only float64 array with one axis."""
    array = numbers(name, value).copy()
    expect(
        array.ndim <= 1,
        name,
        f"an array of shape {array.shape}",
        "must be a number or one number per row",
        "Pass one number, or a schedule of shape (N,).",
    )
    return float(array) if array.ndim == 0 else frozen(array)
