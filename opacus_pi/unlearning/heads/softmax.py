r"""A softmax head whose unlearning is certified by bounds with data-free constants.

**Idea.** With feature vectors of norm at most 1, the Hessian of the loss lies between λ
and ½ + λ whatever the feature vectors are, and the gradient of one example has norm at
most √2‖x‖. So a step contracts by 1 − ηλ, and an example moves it by at most η√2‖x‖/N.
The shifted divergence (``accounting.langevin.shifted``) turns both into D_α ≤ αμ²/2, in
both directions and for any order of requests.

**Guarantee.** An upper bound. It depends on an example only by the norm of its feature
vector: if all feature vectors have norm 1, all examples have the same ε. Use a ridge
head to distinguish them.

Source: docs/theory.md, Softmax heads.

>>> from opacus_pi.unlearning.heads import unit_rows
>>> random = np.random.default_rng(0)
>>> labels = random.integers(3, size=60)
>>> rows = unit_rows(np.eye(3)[labels] + random.normal(size=(60, 3)), intercept=True)
>>> head = SoftmaxHead(num_classes=3, regularisation=0.05, noise_std=0.1, seed=0)
>>> claim = head.fit(rows, labels).forget([3, 7], epsilon=0.5)
>>> claim.kind, claim.epsilon(1e-5) <= 0.5
('certified if', True)
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax

from opacus_pi._types import ArrayLike
from opacus_pi.accounting.conversion import rdp_to_epsilon
from opacus_pi.accounting.guarantee import Guarantee, derived, guarantee_of_run
from opacus_pi.accounting.langevin.shifted import (
    learn_unlearn_mu_squared,
    shifted_mu_squared,
)
from opacus_pi.unlearning.heads.gaussian_pairs import ORDERS
from opacus_pi.unlearning.heads.noisy_head import (
    Array,
    Indices,
    NoisyHead,
)

_ROUNDED_UP = 1 + 1e-12


class SoftmaxHead(NoisyHead):
    """Softmax regression on frozen features, with certified bounds.

    One step is w ← w − η∇f(w) + N(0, noise_std²·I), f(w) = Σ ℓ(w; x, y)/N + (λ/2)‖w‖²
    with the cross-entropy ℓ.

    Args:
        num_classes: Number of classes.
        regularisation: λ > 0.
        noise_std: Standard deviation of the noise of one step, on every weight.
        num_steps: T, number of training steps.
        learning_rate: η, at most 1/(½ + λ), which is the default.
        initial_std: Standard deviation of the weights at the start, around 0.
        denominator: N, fixed when examples are removed; None: the number of examples in
            ``fit``, which is then public.
        seed: Seed, or generator, of the noise; None: from the operating system.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: docs/theory.md, Softmax heads.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        regularisation: float = 3e-3,
        noise_std: float = 0.02,
        num_steps: int = 300,
        learning_rate: float | None = None,
        initial_std: float = 0.0,
        denominator: float | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        super().__init__(
            regularisation=regularisation,
            noise_std=noise_std,
            num_steps=num_steps,
            learning_rate=learning_rate,
            initial_std=initial_std,
            num_classes=num_classes,
            denominator=denominator,
            seed=seed,
        )

    def epsilons(
        self,
        delta: float = 1e-5,
        *,
        num_steps: int | Sequence[int] = 0,
        indices: ArrayLike | None = None,
    ) -> Array:
        """Return a bound on ε of forgetting each example, after some unlearning steps.

        It holds in both directions.

        Args:
            delta: δ in (0, 1).
            num_steps: Unlearning steps, or several numbers of them.
            indices: Positions in the training set; None: all in ``remaining``.

        Returns:
            float64 ``(n,)``, or ``(K, n)`` for K numbers of steps.

        Raises:
            ValueError: If the head is not fitted or an argument is outside its domain.
        """
        places, counts = self._asked(delta, num_steps, indices)
        norms = np.linalg.norm(self._features[places], axis=1)
        pulls, which = np.unique(math.sqrt(2) * norms, return_inverse=True)
        found = np.array(
            [
                [_epsilon(self._mu_squared(float(p), k), delta) for p in pulls]
                for k in counts
            ]
        )[:, which]
        return found if np.ndim(num_steps) else found[0]

    def _mu_squared(self, pull: float, num_steps: int) -> float:
        """Return μ² of D_α ≤ αμ²/2 for all forgotten sets and one more.

        Args:
            pull: Bound on the norm of the sum of the new set's gradients.
            num_steps: Unlearning steps after its removal.
        """
        scale = self.learning_rate / self._denominator * _ROUNDED_UP
        contraction = 1 - self.learning_rate * self.regularisation
        noise = self.noise_std**2
        if not self._requests:
            return float(
                learn_unlearn_mu_squared(
                    contraction, scale * pull, self.num_steps, num_steps, noise
                )
            )
        left = pull + sum(earlier for earlier, _ in self._requests)
        shifts = [np.full(self.num_steps, left)]
        for earlier, steps in self._requests:
            left -= earlier
            shifts.append(np.full(steps, max(left, pull)))
        shifts.append(np.zeros(num_steps))
        moves = scale * np.concatenate(shifts)
        same = np.full_like(moves, contraction)
        return shifted_mu_squared(same, moves, np.full_like(moves, noise))

    def _pull(self, places: Indices) -> float:
        """Return a bound on the norm of a set's summed gradients, over all weights.

        Every gradient is a residual of norm at most √2 times that of its feature
        vector.
        """
        rows = self._features[places]
        together = math.sqrt(2 * len(rows)) * float(np.linalg.norm(rows, 2))
        apart = math.sqrt(2) * float(np.linalg.norm(rows, axis=1).sum())
        return min(together, apart) * _ROUNDED_UP

    def _curve(self, places: Indices, delta: float) -> Callable[[int], float]:
        pull = self._pull(places)
        return lambda k: _epsilon(self._mu_squared(pull, k), delta)

    def _claim(
        self, places: Indices, num_steps: int, delta: float, given: bool
    ) -> Guarantee:
        mu_squared = self._mu_squared(self._pull(places), num_steps)
        eta, penalty = self.learning_rate, self.regularisation
        bound = derived(
            "Every step contracts distances, and the forgotten rows move the weights "
            "by a bounded distance",
            f"factor {1 - eta * penalty:.6g}, at most {eta:.3g}·√2·(norm of a row)/N; "
            "docs/theory.md, Softmax heads",
        )
        curve = (ORDERS * mu_squared / 2).tolist()
        return guarantee_of_run(
            self._what(places, num_steps, "softmax"),
            [*self._shared_assumptions(num_steps, given), bound],
            ORDERS,
            curve,
            reverse_divergences=curve,
        )

    def _remove(self, places: Indices, num_steps: int) -> None:
        self._requests.append((self._pull(places), num_steps))

    def _data_smoothness(self) -> float:
        return 0.5

    def _begin(self) -> None:
        self._requests: list[tuple[float, int]] = []  # pull, and steps afterwards

    def _begin_phase(self) -> None:
        """Nothing to prepare: the gradient reads the remaining examples."""

    def _gradient(self, weights: Array) -> Array:
        residuals = softmax(self._features @ weights, axis=1) - self._targets
        pull: Array = self._features.T @ residuals / self._denominator
        return pull + self.regularisation * weights


def _epsilon(mu_squared: float, delta: float) -> float:
    """Return ε of D_α ≤ αμ²/2 at all orders."""
    return float(rdp_to_epsilon(ORDERS * mu_squared / 2, ORDERS, delta))
