"""The base of all heads: noisy full-batch descent, and the examples that remain.

A head is one linear layer on frozen features. It is trained by gradient descent on all
examples, with Gaussian noise in every step. To forget examples, it goes on with the
rest. All that the steps depend on besides the examples is fixed before training: the
step size, the noise, the penalty, the denominator and the start. So the distribution of
the weights after unlearning can be compared with that of retraining for as many steps.

Subclasses supply the gradient and the comparison.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from opacus_pi._types import ArrayLike
from opacus_pi._validate import (
    distinct_indices,
    expect,
    in_range,
    numbers,
    positive,
    require,
)
from opacus_pi.accounting.conversion import check_delta, warn_of_large_delta
from opacus_pi.accounting.guarantee import Assumption, Guarantee, observed
from opacus_pi.accounting.langevin.contraction import first_step
from opacus_pi.accounting.training_bound import item_is_the_unit
from opacus_pi.unlearning.heads.features import checked_matrix, checked_rows

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
_MOST_STEPS = 100_000_000
_MOST_DOUBLINGS = 27  # about as many steps


@dataclass(frozen=True)
class ForgettingCost:
    """The cost of forgetting some examples.

    Attributes:
        epsilon_before: ε without any unlearning step, in both directions.
        num_steps: Unlearning steps until ε is at most the target.
        num_retraining_steps: Steps that training has had so far; retraining from the
            start without the examples gives ε = 0.
        epsilon: ε after ``num_steps``.
        delta: δ of every ε.
    """

    epsilon_before: float
    num_steps: int
    num_retraining_steps: int
    epsilon: float
    delta: float


class NoisyHead(ABC):
    """A linear layer, trained by noisy gradient descent; base of the heads.

    Args:
        regularisation: λ > 0 of the penalty (λ/2)‖w‖².
        noise_std: Standard deviation of the noise of one step, on every weight.
        num_steps: T, number of training steps.
        learning_rate: η, at most 1/L, where L bounds the curvature of the head's
            objective (see the subclass); None: 1/L.
        initial_std: Standard deviation of the weights at the start, around 0.
        num_classes: Number of classes. It is not read from the labels, because an
            example to forget could be the only one of its class.
        denominator: N, the number by which sums over examples are divided, at least
            the number of examples. It keeps its value when examples are removed. None:
            the number of examples in ``fit``, which is then public.
        seed: Seed, or generator, of the noise; None: from the operating system.

    Raises:
        ValueError: If an argument is outside its domain.
    """

    coef_: Array
    """Weights, ``(d, m)``, one column for each output."""

    def __init__(
        self,
        *,
        regularisation: float = 0.01,
        noise_std: float = 1e-3,
        num_steps: int = 1000,
        learning_rate: float | None = None,
        initial_std: float = 0.0,
        num_classes: int | None = None,
        denominator: float | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        positive(
            regularisation=regularisation,
            noise_std=noise_std,
            num_steps=num_steps,
            remedy="Pass a number above 0, or the head cannot forget.",
        )
        largest = np.finfo(np.float64).max
        in_range(
            0,
            largest,
            initial_std=initial_std,
            remedy="Pass 0 to start at zero weights.",
        )
        limit = 1 / (self._data_smoothness() + regularisation)
        self.learning_rate = limit if learning_rate is None else float(learning_rate)
        remedy = "Leave it out: the default is the largest rate with a certificate."
        positive(learning_rate=self.learning_rate, remedy=remedy)
        in_range(0, limit, learning_rate=self.learning_rate, remedy=remedy)
        self.regularisation, self.noise_std = float(regularisation), float(noise_std)
        self.num_steps, self.initial_std = _whole("num_steps", num_steps), initial_std
        self.num_classes = num_classes
        if num_classes is not None:
            self.num_classes = _whole("num_classes", num_classes)
            in_range(
                2,
                math.inf,
                num_classes=num_classes,
                remedy="Pass the number of classes.",
            )
        self.denominator = denominator
        self._random = np.random.default_rng(seed)

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        """Train the head from its start.

        Args:
            features: ``(n, d)``, feature vectors of norm at most 1; see ``unit_rows``.
            targets: Labels ``(n,)``, whole numbers from 0 to ``num_classes`` − 1. A
                head for regression takes numbers, ``(n,)`` or ``(n, m)``.

        Returns:
            The head itself.

        Raises:
            ValueError: If the feature vectors are not finite or too long, there are
                more than the denominator, or the targets do not fit.
        """
        rows = checked_rows(features)
        coded = self._coded(targets, len(rows))
        given = self.denominator
        self._denominator = float(len(rows) if given is None else given)
        expect(
            len(rows) <= self._denominator,
            "denominator",
            self._denominator,
            f"must be at least the number of rows, {len(rows)}",
            "Leave it out, or pass a public upper limit of the number of rows.",
        )
        self.remaining: Indices = np.arange(len(rows))
        self._num_fitted, self._features, self._targets = len(rows), rows, coded
        self._total_steps = self.num_steps
        start = self._random.normal(size=(rows.shape[1], coded.shape[1]))
        self.coef_ = self.initial_std * start
        self._begin()
        self._descend(self.num_steps)
        return self

    def predict(self, features: ArrayLike) -> NDArray[np.float64] | NDArray[np.int64]:
        """Return the classes of some examples, or their values in a regression.

        Args:
            features: ``(n, d)``, scaled as in training.

        Returns:
            int64 ``(n,)``, or float64 in the shape of the targets.

        Raises:
            ValueError: If the head is not fitted or the feature vectors have another
                width.
        """
        values = self.decision_function(features)
        if self.num_classes is not None:
            labels: Indices = values.argmax(axis=1).astype(np.int64)
            return labels
        flat: Array = values[:, 0]
        return flat if self._is_flat else values

    def decision_function(self, features: ArrayLike) -> Array:
        """Return the outputs of the layer, float64 ``(n, m)``.

        Args:
            features: ``(n, d)``, scaled as in training.

        Raises:
            ValueError: If the head is not fitted or the feature vectors have another
                width.
        """
        self._check_fitted("predict")
        rows = checked_matrix(features)
        expect(
            rows.shape[1] == len(self.coef_),
            "features",
            f"{rows.shape[1]} columns",
            f"must have {len(self.coef_)} columns, as in training",
            "Use the same extractor and the same scaling.",
        )
        return rows @ self.coef_

    def score(self, features: ArrayLike, targets: ArrayLike) -> float:
        """Return the accuracy, or R² of a regression.

        Args:
            features: ``(n, d)``, scaled as in training.
            targets: As in ``fit``.

        Raises:
            ValueError: As ``predict``, or if the targets do not fit.
        """
        found = self.predict(features)
        wanted = np.asarray(targets)
        if self.num_classes is not None:
            self._coded(targets, len(found))
            return float((found == wanted).mean())
        spread = np.square(wanted - wanted.mean(axis=0)).sum()
        return float(1 - np.square(wanted - found).sum() / spread)

    def forget(
        self,
        indices: ArrayLike,
        *,
        epsilon: float = 1.0,
        delta: float = 1e-5,
        num_steps: int | None = None,
    ) -> Guarantee:
        """Forget examples: train on without them, and erase their feature vectors.

        The head then holds the weights, the remaining examples, and what later requests
        need. Release the weights only.

        Args:
            indices: Positions in the training set, not forgotten before.
            epsilon: Take the fewest steps with ε at most this, in both directions.
            delta: δ of that ε.
            num_steps: Take this many steps instead. A number that was fixed beforehand
                tells nothing about the examples; one computed from ``epsilon`` may.

        Returns:
            What may be claimed. The comparison is with training for as many steps in
            all, without all examples that were forgotten so far.

        Raises:
            ValueError: If the head is not fitted, an index is wrong or was forgotten,
                or no example would be left.
        """
        places = self._places(indices, "forget")
        given = num_steps is not None
        if num_steps is None:
            num_steps = self._steps(places, epsilon, delta)
        else:
            in_range(
                0,
                _MOST_STEPS,
                num_steps=num_steps,
                remedy="Pass the number of steps to take.",
            )
            num_steps = _whole("num_steps", num_steps)
        claim = self._claim(places, num_steps, delta, given)
        self._remove(places, num_steps)
        kept = np.delete(np.arange(len(self.remaining)), places)
        self.remaining = self.remaining[kept]
        self._features, self._targets = self._features[kept], self._targets[kept]
        self._begin_phase()
        self._descend(num_steps)
        self._total_steps += num_steps
        return claim

    def cost(
        self, indices: ArrayLike, *, epsilon: float = 1.0, delta: float = 1e-5
    ) -> ForgettingCost:
        """Return what it would take to forget some examples together.

        Args:
            indices: Positions in the training set, not forgotten before.
            epsilon: Target ε, above 0, in both directions.
            delta: δ in (0, 1).

        Raises:
            ValueError: As ``forget``.
        """
        places = self._places(indices, "cost")
        steps = self._steps(places, epsilon, delta)
        curve = self._curve(places, delta)
        before, after = curve(0), curve(steps)
        return ForgettingCost(before, steps, self._total_steps, after, delta)

    @abstractmethod
    def epsilons(
        self,
        delta: float = 1e-5,
        *,
        num_steps: int | Sequence[int] = 0,
        indices: ArrayLike | None = None,
    ) -> Array:
        """Return ε of forgetting each example alone, after some unlearning steps.

        Args:
            delta: δ in (0, 1).
            num_steps: Unlearning steps, or several numbers of them.
            indices: Positions in the training set; None: all in ``remaining``.

        Returns:
            float64 ``(n,)``, or ``(K, n)`` for K numbers of steps.

        Raises:
            ValueError: If the head is not fitted or an argument is outside its domain.
        """

    def steps_to(
        self,
        epsilon: float = 1.0,
        delta: float = 1e-5,
        *,
        indices: ArrayLike | None = None,
    ) -> Indices:
        """Return the unlearning steps after which each example's ε is at most a target.

        Args:
            epsilon: Target, above 0.
            delta: δ in (0, 1).
            indices: As in ``epsilons``.

        Returns:
            int64 ``(n,)``, the fewest steps of each.

        Raises:
            ValueError: As ``epsilons``.
        """
        check_target(epsilon)
        positions = self.remaining[self._chosen(indices)]
        low = np.full(len(positions), -1)
        high = np.zeros(len(positions), dtype=np.int64)
        active = np.ones(len(positions), dtype=bool)
        for doubling in range(_MOST_DOUBLINGS):
            at = 2**doubling - 1
            found = self.epsilons(delta, num_steps=at, indices=positions[active])
            high[active] = at
            missed = np.flatnonzero(active)[found > epsilon]
            active[:] = False
            active[missed] = True
            low[missed] = at
            if not active.any():
                break
        return self._bisected(positions, low, high, epsilon, delta)

    def _bisected(
        self,
        positions: Indices,
        low: Indices,
        high: Indices,
        epsilon: float,
        delta: float,
    ) -> Indices:
        """Return the fewest steps between two numbers, the upper of which is enough."""
        while (high - low > 1).any():
            middle = (low + high) // 2
            for at in np.unique(middle[high - low > 1]):
                some = (middle == at) & (high - low > 1)
                enough = epsilon >= self.epsilons(
                    delta, num_steps=int(at), indices=positions[some]
                )
                high[some] = np.where(enough, at, high[some])
                low[some] = np.where(enough, low[some], at)
        return high

    def ranking(self, delta: float = 1e-5, *, num_steps: int = 0) -> Indices:
        """Return the positions of the remaining examples, hardest to forget first.

        Args:
            delta: δ of the ε that ranks them.
            num_steps: Unlearning steps after which they are ranked.

        Raises:
            ValueError: If the head is not fitted.
        """
        order = np.argsort(-self.epsilons(delta, num_steps=num_steps), kind="stable")
        return self.remaining[order]

    def _steps(self, places: Indices, epsilon: float, delta: float) -> int:
        """Return the fewest steps after which ε of a set is at most the target."""
        check_target(epsilon)
        check_delta(delta)
        warn_of_large_delta(delta, len(self.remaining))
        curve = self._curve(places, delta)
        found = first_step(lambda k: curve(k) <= epsilon, _MOST_STEPS)
        require(
            math.isfinite(found),
            f"epsilon={epsilon:g} is not reached within {_MOST_STEPS} steps.",
            "Choose a larger epsilon, or retrain without the examples.",
        )
        return int(found)

    def _shared_assumptions(self, num_steps: int, given: bool) -> list[Assumption]:
        """Return the assumptions that all heads make."""
        eta, total = self.learning_rate, self._total_steps + num_steps
        chosen = "was given" if given else "was computed from the rows to forget"
        return [
            observed(
                "Each row has norm at most 1",
                "fit refuses longer rows",
            ),
            observed(
                "Every step uses all remaining rows and otherwise only constants",
                f"step size {eta:.6g}, penalty {self.regularisation:g}, denominator "
                f"{self._denominator:g}",
            ),
            observed(
                f"Every step adds N(0, {self.noise_std**2:.3g} I) to the weights",
                "drawn by the head; pseudo-random, in float64",
            ),
            observed(
                "The start does not depend on the rows",
                f"mean 0, standard deviation {self.initial_std:g}",
            ),
            observed(
                f"Retraining takes the same number of steps, {total}",
                f"{num_steps} unlearning steps; this number {chosen}",
            ),
            Assumption(
                "Neither the extractor nor the scaling of the features was made from "
                "the rows to forget",
                True,
                "the head sees only the features",
            ),
            Assumption(
                "The constants of the head were not chosen from the rows to forget",
                True,
                f"passed by the caller; so was the denominator, {self._denominator:g}"
                if self.denominator is not None
                else "passed by the caller; the denominator is the number of rows, "
                f"{self._num_fitted}, which is then public",
            ),
            Assumption(
                "Nothing else was released, above all no earlier weights, and no "
                "request depends on earlier weights",
                True,
                "the head cannot see what is released",
            ),
            item_is_the_unit(),
        ]

    def _what(self, places: Indices, num_steps: int, kind: str) -> str:
        """Return in words what is run, for the guarantee."""
        gone = self._num_fitted - len(self.remaining) + len(places)
        return (
            f"{num_steps} noisy {kind} steps on {self._num_fitted - gone} of "
            f"{self._num_fitted} examples, after {self._total_steps} steps"
        )

    def _places(
        self, indices: ArrayLike, caller: str, *, leave_one: bool = True
    ) -> Indices:
        """Return where the given positions are among the remaining examples, sorted."""
        self._check_fitted(caller)
        wanted = distinct_indices("indices", indices, self._num_fitted)
        gone = np.setdiff1d(wanted, self.remaining)
        expect(
            gone.size == 0,
            "indices",
            gone[:1],
            "must not have been forgotten before",
            "Leave them out; head.remaining lists the positions that are left.",
        )
        expect(
            len(wanted) < len(self.remaining) or not leave_one,
            "indices",
            f"all {len(wanted)} remaining examples",
            "must leave at least one example",
            "Delete the head instead.",
        )
        return np.searchsorted(self.remaining, wanted)

    def _chosen(self, indices: ArrayLike | None) -> Indices:
        """Return places among the remaining examples; None means all."""
        self._check_fitted("epsilons")
        if indices is None:
            return np.arange(len(self.remaining))
        wanted = np.asarray(indices)
        order = np.argsort(wanted, kind="stable")
        places = np.empty(len(wanted), dtype=np.int64)
        places[order] = self._places(wanted, "epsilons", leave_one=False)
        return places

    def _asked(
        self,
        delta: float,
        num_steps: int | Sequence[int],
        indices: ArrayLike | None,
    ) -> tuple[Indices, list[int]]:
        """Check the arguments of ``epsilons``; return places and numbers of steps."""
        check_delta(delta)
        counts, chosen = counts_of(num_steps), self._chosen(indices)
        warn_of_large_delta(delta, len(self.remaining))
        return chosen, counts

    def _check_fitted(self, caller: str) -> None:
        """Raise ``ValueError`` before ``fit``."""
        expect(
            hasattr(self, "coef_"),
            type(self).__name__,
            "an unfitted head",
            f"must be fitted before {caller}",
            "Call fit(features, targets) first.",
        )

    def _coded(self, targets: ArrayLike, size: int) -> Array:
        """Return targets as the matrix that the head learns, ``(n, m)``."""
        y = numbers("targets", targets)
        self._is_flat = y.ndim == 1
        expect(
            y.ndim in ((1,) if self.num_classes else (1, 2)) and len(y) == size,
            "targets",
            f"an array of shape {y.shape}",
            f"must have one entry for each of the {size} rows",
            "Labels are a flat list.",
        )
        if self.num_classes is None:
            expect(
                bool(np.isfinite(y).all()),
                "targets",
                y[~np.isfinite(y)][:1],
                "must be finite",
                "Leave rows without a target out.",
            )
            return y.reshape(size, -1)
        fits = (y >= 0) & (y < self.num_classes) & (y == np.floor(y))
        expect(
            bool(fits.all()),
            "targets",
            y[~fits][:1],
            f"must be whole numbers from 0 to {self.num_classes - 1}",
            "Encode the labels, and pass num_classes.",
        )
        return np.eye(self.num_classes)[y.astype(np.int64)]

    def _descend(self, num_steps: int) -> None:
        """Make noisy gradient steps on the remaining examples."""
        for _ in range(num_steps):
            noise = self._random.normal(scale=self.noise_std, size=self.coef_.shape)
            step = self.learning_rate * self._gradient(self.coef_)
            self.coef_ = self.coef_ - step + noise
        self.coef_.flags.writeable = False  # guarantees are about the steps alone

    @abstractmethod
    def _data_smoothness(self) -> float:
        """Return L − λ, the largest curvature of the loss at norm 1."""

    @abstractmethod
    def _begin(self) -> None:
        """Prepare the comparison after new examples were given, before training."""

    @abstractmethod
    def _begin_phase(self) -> None:
        """Prepare the gradient after examples were removed."""

    @abstractmethod
    def _gradient(self, weights: Array) -> Array:
        """Return the gradient on the remaining examples, with the penalty."""

    @abstractmethod
    def _curve(self, places: Indices, delta: float) -> Callable[[int], float]:
        """Return ε of forgetting a set, both directions, as a function of the steps."""

    @abstractmethod
    def _claim(
        self, places: Indices, num_steps: int, delta: float, given: bool
    ) -> Guarantee:
        """Return what may be claimed after forgetting a set."""

    @abstractmethod
    def _remove(self, places: Indices, num_steps: int) -> None:
        """Note for later requests what is done now; the examples are still there."""


def counts_of(num_steps: int | Sequence[int]) -> list[int]:
    """Return numbers of unlearning steps as a list.

    Args:
        num_steps: One number, or several.

    Raises:
        ValueError: If one is negative or not whole.
    """
    values = np.atleast_1d(np.asarray(num_steps))
    in_range(
        0,
        _MOST_STEPS,
        num_steps=values,
        remedy="Pass numbers of steps, 0 for the head before unlearning.",
    )
    return [_whole("num_steps", value) for value in values.tolist()]


def check_target(epsilon: float) -> None:
    """Raise ``ValueError`` for a target ε that no number of steps reaches.

    Args:
        epsilon: The target.

    Raises:
        ValueError: If it is not above 0.
    """
    positive(
        epsilon=epsilon,
        remedy="Noise brings epsilon close to 0, never to 0: retrain for that.",
    )


def _whole(name: str, value: float) -> int:
    """Return a number as int, or raise if it is not whole."""
    whole = not isinstance(value, bool) and float(value).is_integer()
    expect(whole, name, value, "must be a whole number", "Round it.")
    return int(value)
