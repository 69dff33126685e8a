"""A ridge head whose unlearning is certified exactly.

Ridge regression by noisy full-batch gradient descent has Gaussian weights at every
step. So both distributions that a certificate compares are known: that of the weights
after what was done, and that of retraining. Nothing is bounded and nothing is
estimated, for one example, for a set, and for any order of requests.

>>> from opacus_pi.unlearning.heads import unit_rows
>>> random = np.random.default_rng(0)
>>> labels = random.integers(3, size=60)
>>> rows = unit_rows(np.eye(3)[labels] + random.normal(size=(60, 3)), intercept=True)
>>> head = RidgeHead(num_classes=3, noise_std=0.01, num_steps=200, seed=0)
>>> head = head.fit(rows, labels)
>>> before, after = head.epsilons(num_steps=[0, 50])
>>> bool((after < before).all())
True
>>> claim = head.forget([3, 7], epsilon=0.5)
>>> claim.kind, claim.epsilon(1e-5) <= 0.5, len(head.remaining)
('certified if', True, 58)
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.accounting.guarantee import (
    EpsilonDelta,
    Guarantee,
    derived,
    guarantee_of_run,
)
from opacus_pi.unlearning.heads.compression import Compression, widened
from opacus_pi.unlearning.heads.gaussian_pairs import ORDERS, GaussianPair
from opacus_pi.unlearning.heads.noisy_head import (
    Array,
    Indices,
    NoisyHead,
)
from opacus_pi.unlearning.heads.ridge_laws import Descent, Gap, Process

_CHUNK = 128  # examples that are compared at once
_MOST_THREADS = 8
_MOST_WIDENED = 1e-6  # τ above which an example is compared in all dimensions


class RidgeHead(NoisyHead):
    """Ridge classifier or regression on frozen features, with exact certificates.

    One step is w ← w − η(Hw − b) + N(0, noise_std²·I), H = XᵀX/N + λI, b = XᵀY/N. A
    classifier learns one-hot labels minus 1/``num_classes``.

    Args:
        regularisation: λ > 0.
        noise_std: Standard deviation of the noise of one step, on every weight.
        num_steps: T, number of training steps.
        learning_rate: η, at most 1/(1 + λ), which is the default.
        initial_std: Standard deviation of the weights at the start, around 0.
        num_classes: Number of classes; None: a regression.
        denominator: N, fixed when examples are removed; None: the number of examples in
            ``fit``, which is then public.
        seed: Seed, or generator, of the noise; None: from the operating system.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: docs/theory.md, "Ridge heads".
    """

    _compressed_descent: Compression | None = None
    _gram: Array
    _slope: Array

    def epsilons(
        self,
        delta: float = 1e-5,
        *,
        num_steps: int | Sequence[int] = 0,
        indices: ArrayLike | None = None,
        method: str = "hockey-stick",
    ) -> Array:
        """Return ε of forgetting each example alone, after some unlearning steps.

        It is the larger ε of the two directions. Before anything was forgotten, all
        examples are compared at once in few dimensions, with an error that is bounded
        and added. Afterwards each takes an eigendecomposition, d³ operations.

        Args:
            delta: δ in (0, 1).
            num_steps: Unlearning steps, or several numbers of them.
            indices: Positions in the training set; None: all in ``remaining``.
            method: ``"hockey-stick"``: the exact pair (ε, δ); where its integral
                converges slowly (few columns and dimensions), an upper bound.
                ``"renyi"``: by conversion from the exact divergences, 5 to 15 % more.

        Returns:
            float64 ``(n,)``, or ``(K, n)`` for K numbers of steps.

        Raises:
            ValueError: If the head is not fitted or an argument is outside its domain.
        """
        _check_method(method)
        places, counts = self._asked(delta, num_steps, indices)
        rows = [places[i : i + _CHUNK] for i in range(0, len(places), _CHUNK)]
        options = (counts, delta, method)
        compare = self._one_by_one
        if len(self.remaining) == self._num_fitted:
            compare = partial(self._compressed, self._compression())
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
            parts = pool.map(lambda some: compare(some, *options), rows)
            found = np.concatenate(list(parts), axis=1)
        return found if np.ndim(num_steps) else found[0]

    def _compression(self) -> Compression:
        """Return the compression of the descent on all examples, made once."""
        if self._compressed_descent is None:
            descent = Descent.of(self._process, self._gram, self._slope)
            self._compressed_descent = Compression.of(descent, self._features)
        return self._compressed_descent

    def _compressed(
        self,
        small: Compression,
        places: Indices,
        counts: list[int],
        delta: float,
        method: str,
    ) -> Array:
        """Return ε of some examples by the compression, with its error added."""
        pairs, slack = small.pairs(
            self._features[places], self._targets[places], self.num_steps, counts
        )
        found = np.empty((len(counts), len(places)))
        odd = np.zeros(len(places), dtype=bool)
        for row, pair in zip(found, pairs, strict=True):
            wider = widened(_two_sided(pair, delta, "renyi"), slack, delta)
            odd |= ~(wider <= _MOST_WIDENED)
            largest = wider[~odd].max(initial=0.0)
            smaller = delta * math.exp(-largest) * (1 - 1e-9)
            row[:] = _two_sided(pair, smaller, method) + 2 * wider
        if odd.any():
            found[:, odd] = self._one_by_one(places[odd], counts, delta, method)
        return found

    def _one_by_one(
        self, places: Indices, counts: list[int], delta: float, method: str
    ) -> Array:
        """Return ε of some examples, each in all dimensions."""
        found = np.empty((len(counts), len(places)))
        for column, place in enumerate(places):
            gap = self._gap(np.array([place]))
            for row, k in enumerate(counts):
                found[row, column] = _two_sided(gap.pair(k), delta, method)[0]
        return found

    def _coded(self, targets: ArrayLike, size: int) -> Array:
        coded = super()._coded(targets, size)
        return coded if self.num_classes is None else coded - 1 / self.num_classes

    def _data_smoothness(self) -> float:
        return 1.0

    def _begin(self) -> None:
        self._process = Process(
            self.learning_rate,
            self.regularisation,
            self.noise_std**2,
            self.initial_std**2,
            self._denominator,
        )
        self._begin_phase()
        descent = Descent.of(self._process, self._gram, self._slope)
        self._law = descent.trained(self.num_steps)
        self._compressed_descent = None

    def _begin_phase(self) -> None:
        self._gram = self._features.T @ self._features / self._denominator
        self._slope = self._features.T @ self._targets / self._denominator

    def _gradient(self, weights: Array) -> Array:
        pull: Array = self._gram @ weights + self.regularisation * weights
        return pull - self._slope

    def _without(self, places: Indices) -> Descent:
        """Return the descent on the remaining examples without the given ones."""
        rows, targets = self._features[places], self._targets[places]
        gram = self._gram - rows.T @ rows / self._denominator
        slope = self._slope - rows.T @ targets / self._denominator
        return Descent.of(self._process, gram, slope)

    def _gap(self, places: Indices) -> Gap:
        """Return how the distribution of the weights differs from that of retraining.

        Args:
            places: The examples that retraining leaves out.
        """
        return Gap.between(self._law, self._without(places), self._total_steps)

    def _curve(self, places: Indices, delta: float) -> Callable[[int], float]:
        gap = self._gap(places)
        return lambda k: float(_two_sided(gap.pair(k), delta, "hockey-stick")[0])

    def _claim(
        self, places: Indices, num_steps: int, delta: float, given: bool
    ) -> Guarantee:
        pair = self._gap(places).pair(num_steps)
        forward, backward = (
            float(side.epsilons(delta)[0]) for side in (pair, pair.reversed())
        )
        both = max(forward, backward)
        exact = derived(
            "Unlearned and retrained weights are Gaussian with known means and "
            "covariances, so the divergence is exact",
            "docs/theory.md, Ridge heads; computed in float64",
        )
        return guarantee_of_run(
            self._what(places, num_steps, "ridge"),
            [*self._shared_assumptions(num_steps, given), exact],
            ORDERS,
            pair.divergences(ORDERS)[:, 0],
            reverse_divergences=pair.reversed().divergences(ORDERS)[:, 0],
            statements=[
                EpsilonDelta(forward, delta, "the hockey-stick divergence"),
                EpsilonDelta(both, delta, "the hockey-stick divergence", True),
            ],
        )

    def _remove(self, places: Indices, num_steps: int) -> None:
        self._law = self._without(places).advanced(self._law, num_steps)


def _two_sided(pair: GaussianPair, delta: float, method: str) -> Array:
    """Return the larger ε of the two directions."""
    sides = (pair, pair.reversed())
    if method == "renyi":
        return np.maximum(*(side.renyi_epsilons(delta)[0] for side in sides))
    return np.maximum(*(side.epsilons(delta) for side in sides))


def _check_method(method: str) -> None:
    """Raise ``ValueError`` for an unknown way to compute ε."""
    expect(
        method in ("hockey-stick", "renyi"),
        "method",
        repr(method),
        'must be "hockey-stick" or "renyi"',
        "The hockey-stick gives the smaller epsilon.",
    )
