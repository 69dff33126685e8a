"""Exact law of a model of two weights that is trained by DP-SGD, as an oracle.

The weights are stored on a grid: after each noisy update both are rounded to the next
grid point (the outermost points take everything beyond them). Rounding does not look at
the data, so every bound on DP-SGD holds for this training too. Its law is that of a
Markov chain with finitely many states, and the probability of a step is a difference of
normal distribution functions: nothing is sampled, and nothing is discretised further.
With grid points closer than the noise the divergences are those of real numbers to
within a few per cent, from below.

A *law* is an array of non-negative numbers, one for each state. ``TinyTraining.step``
is linear in it, so parts of a law (for example of the runs that a filter has stopped)
can be followed separately and put side by side at the end.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import logsumexp, ndtr


@dataclass(frozen=True)
class TinyTraining:
    """DP-SGD on two weights: w ← round(w − step_size · (Σ clipped gradients + noise)).

    Args:
        gradients: From weights ``(S, 2)`` to the gradient of each example's loss,
            ``(S, n, 2)``.
        max_grad_norm: Clip norm C.
        noise_std: Standard deviation of the noise on the sum of clipped gradients.
        step_size: Learning rate over the denominator, which is the same with and
            without any example.
        grid: ``(M,)``, increasing: the values that each weight can have.
    """

    gradients: Callable
    max_grad_norm: float
    noise_std: float
    step_size: float
    grid: np.ndarray

    @cached_property
    def states(self):
        """All pairs of weights, ``(M², 2)``."""
        first, second = np.meshgrid(self.grid, self.grid, indexing="ij")
        return np.column_stack([first.ravel(), second.ravel()])

    @cached_property
    def clipped(self):
        """Each example's clipped gradient at each state, ``(M², n, 2)``."""
        gradients = self.gradients(self.states)
        norms = np.linalg.norm(gradients, axis=-1, keepdims=True)
        return gradients * np.minimum(1, self.max_grad_norm / np.maximum(norms, 1e-300))

    @cached_property
    def ratios(self):
        """Each example's clipped norm over the noise at each state, ``(M², n)``."""
        return np.linalg.norm(self.clipped, axis=-1) / self.noise_std

    def start(self, weights):
        """The law that is at the grid point next to these two weights."""
        law = np.zeros(len(self.states))
        law[np.square(self.states - weights).sum(axis=1).argmin()] = 1
        return law

    def step(self, law, rates):
        """The law after one update.

        Args:
            law: ``(M²,)``, at least 0; it need not sum to 1.
            rates: ``(n,)`` or ``(M², n)``: with which probability each example is in
                the batch, independently. 0: the example is not there; 1: it always is.
        """
        here = np.flatnonzero(law)
        rates = np.broadcast_to(rates, (len(law), self.clipped.shape[1]))[here]
        after = np.zeros((len(self.grid), len(self.grid)))
        for batch in _batches(rates):
            weight = law[here] * np.where(batch, rates, 1 - rates).prod(axis=1)
            some = np.flatnonzero(weight)
            if len(some):
                moved = self.clipped[here[some]][:, batch].sum(axis=1)
                means = self.states[here[some]] - self.step_size * moved
                first, second = (self._cells(means[:, axis]) for axis in (0, 1))
                after += (first * weight[some, None]).T @ second
        return after.ravel()

    def _cells(self, means):
        """Probability of each grid point for a weight with these means, ``(S, M)``."""
        edges = (self.grid[1:] + self.grid[:-1]) / 2
        edges = np.concatenate([[-np.inf], edges, [np.inf]])
        z = (edges - means[:, None]) / (self.step_size * self.noise_std)
        low, high = z[:, :-1], z[:, 1:]
        # in the upper tail, differences of the survival function keep their digits
        return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))

    def run(self, law, schedule):
        """The law after an update with each of the rates in a list."""
        for rates in schedule:
            law = self.step(law, rates)
        return law


def _batches(rates):
    """All batches that can occur, as masks; an example of rate 0 is in none."""
    options = [
        [False] * bool((column < 1).any()) + [True] * bool((column > 0).any())
        for column in rates.T
    ]
    for batch in itertools.product(*options):
        yield np.array(batch, dtype=bool)


def without(rates, group):
    """The rates of a training without a group of examples."""
    rates = np.array(rates, dtype=float)
    rates[..., list(group)] = 0
    return rates


def renyi(p, q, order):
    """D_order(p ‖ q) of two laws of equal shape, in nats."""
    here = p > 0
    if (q[here] == 0).any():
        return math.inf
    logs = order * np.log(p[here]) + (1 - order) * np.log(q[here])
    return float(logsumexp(logs)) / (order - 1)


def hockey_stick(p, q, epsilon):
    """The smallest δ with p(E) ≤ e^ε q(E) + δ for every event E."""
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def tanh_network(inputs, targets):
    """Gradients of (b·tanh(a·x) − y)²/2 in (a, b) for each example (x, y)."""

    def gradients(weights):
        a, b = weights[:, :1], weights[:, 1:]
        hidden = np.tanh(a * inputs)
        error = b * hidden - targets
        return np.stack([error * b * (1 - hidden**2) * inputs, error * hidden], axis=-1)

    return gradients


def logistic(inputs, labels):
    """Gradients of ln(1 + exp(−y x·w)) for each example, ``(n, 2)`` and ±1."""

    def gradients(weights):
        slope = -labels / (1 + np.exp(np.clip(labels * (weights @ inputs.T), -50, 50)))
        return slope[..., None] * inputs

    return gradients


def outliers(directions):
    """Gradients that are the same at all weights: ``(n, 2)``, maybe long."""
    return lambda weights: np.broadcast_to(
        directions, (len(weights), *directions.shape)
    )


@dataclass(frozen=True)
class Case:
    """A random training, and the group that is taken out of it.

    Args:
        training: The training.
        start: Its first weights.
        schedule: The rates ``(n,)`` of each update.
        group: The examples in question.
    """

    training: TinyTraining
    start: tuple[float, float]
    schedule: tuple[tuple[float, ...], ...]
    group: tuple[int, ...]

    @property
    def laws(self):
        """The final law with the group and without it."""
        first = self.training.start(self.start)
        rest = [without(rates, self.group) for rates in self.schedule]
        return self.training.run(first, self.schedule), self.training.run(first, rest)


def random_case(rng, *, poisson=True, spacing=0.75):
    """A random training of two to four examples, up to three updates.

    Args:
        rng: NumPy's generator.
        poisson: Whether every example has the same rate in every update; otherwise a
            schedule is drawn in which each example is in some updates.
        spacing: Of the grid, in standard deviations of the noise. The grid covers all
            steps and four standard deviations beyond.
    """
    size, num_steps = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    clip, noise = rng.uniform(0.3, 2), rng.uniform(0.7, 3)
    inputs = rng.normal(size=(size, 2)) * rng.choice([0.3, 1, 5])
    labels = rng.choice([-1.0, 1.0], size)
    same_way = np.abs(rng.normal()) * np.ones((size, 2)) * 10
    gradients = [
        tanh_network(inputs[:, 0], inputs[:, 1]),
        logistic(inputs, labels),
        outliers(inputs),
        outliers(same_way),
    ][rng.integers(4)]
    reach = num_steps * size * clip + 4 * noise * clip * math.sqrt(num_steps)
    num_points = math.ceil(2 * reach / (spacing * noise * clip)) + 1
    grid = np.linspace(-reach, reach, num_points)
    training = TinyTraining(gradients, clip, noise * clip, 1.0, grid)
    if poisson:
        rate = float(rng.choice([rng.uniform(0.05, 0.9), 1.0]))
        schedule = [(rate,) * size] * num_steps
    else:
        together = rng.integers(0, 2, (num_steps, 1 if rng.random() < 0.5 else size))
        schedule = np.broadcast_to(together, (num_steps, size)).astype(float).tolist()
    group = rng.choice(size, rng.integers(1, size + 1), replace=False)
    return Case(
        training,
        tuple(rng.normal(size=2)),
        tuple(map(tuple, schedule)),
        tuple(int(i) for i in group),
    )
