r"""Exact comparisons for many examples at once, in a few dimensions each.

**Idea.** Removing one row x changes A = I − ηH into A' = A + ηzzᵀ, z = x/√N. Every
difference between training with and without x is a sum of terms (A'ⁱz)(Aʲz)ᵀ. So it
lives in the span of the vectors Aʲz, which are z, entry by entry in the eigenbasis,
times the powers of the eigenvalues of A. All powers are combinations of a few
functions on the spectrum, up to a tiny error. They are found once for all examples. Let
Q be an orthonormal basis of z times these functions. Then the problem is replaced by
one of the same form with QᵀAQ and Qᵀz, of 10 to 30 dimensions. All inner products that
it needs are products of the squares of z with matrices that the examples share.

**Guarantee.** ``slack`` is a number u such that each of the two distributions differs
from the one that is used by at most u: shifted by at most u standard deviations, and
with covariances that differ by relative eigenvalues whose sum, over all columns, is at
most u. It comes from the sum over all powers of the distance of Aʲz from the span,
which is computed for each example. A statement (ε, δ) about the distributions that are
used becomes one about the true ones with ε + 2τ, where τ ≈ 4u·ln(e^ε/δ) (``widened``).

**What breaks it.** More than one row at a time, or an earlier removal: the difference
then leaves the span. An unusual example may have a large u, or no well-conditioned
basis (u = inf): compare it without compression. Rounding of float64 is not covered.

Source: docs/theory.md, "Ridge heads". Low-rank updates of matrix functions: Beckermann,
Kressner and Schweitzer 2018 (arXiv:1707.03045).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi.unlearning.heads.gaussian_pairs import GaussianPair
from opacus_pi.unlearning.heads.ridge_laws import Descent, decay

Array = NDArray[np.float64]

_DENSE_POWERS = 64  # powers below this are all in the sample, others geometrically
_GROWTH = 1.04
_NEGLIGIBLE = 40.0  # powers from exp(−this) on are bounded, not evaluated
_CHUNK = 4096
_KEPT = 1e-15  # singular values of the sample above this, relative to the largest
_FLOOR = 1e-7  # of a typical entry of z, relative to the largest
_PIVOT = 1e-7  # smallest eigenvalue of the scaled Gram matrix of a basis
_ROUND_OFF = 1e-6  # relative, for denominators close to 1 in the error's bound


@dataclass(frozen=True)
class Compression:
    """A descent on all examples, with the functions that span its powers.

    Attributes:
        descent: On all examples.
        functions: ``(d, r)``, values on the spectrum; orthonormal with the squares of a
            typical z as weights.
        missing: ``(d,)``, at each eigenvalue the sum over all powers j of (j + 1) times
            the squared error of the power's approximation.
        rest: Σ over the powers that were not evaluated, for z of norm 1.
        num_powers: Number of powers that were.
    """

    descent: Descent
    functions: Array
    missing: Array
    rest: float
    num_powers: int

    @classmethod
    def of(cls, descent: Descent, features: Array) -> "Compression":
        """Return the compression of a descent.

        Args:
            descent: On all examples.
            features: All feature vectors, or some that are typical. They decide how
                accurate the functions are where; the error of each example is computed
                in any case.
        """
        typical = np.sqrt(np.square(features @ descent.basis).mean(axis=0))
        typical = np.maximum(typical, _FLOOR * max(typical.max(), 1e-300))
        powers = _sampled_powers(descent.rates)
        weights = np.sqrt(np.gradient(powers) * (powers + 1))
        sample = _powers(descent.rates, powers) * weights * typical[:, None]
        left, values, _ = np.linalg.svd(sample, full_matrices=False)
        left = left[:, values > _KEPT * values[0]]
        missing, last = np.zeros(len(typical)), _last_power(descent.rates)
        for start in range(0, last, _CHUNK):
            some = np.arange(start, min(start + _CHUNK, last))
            target = _powers(descent.rates, some)
            made = left @ (left.T @ (typical[:, None] * target))
            error = target - made / typical[:, None]
            missing += (some + 1) @ np.square(error).T
        slowest = float(descent.rates.min())
        rest = math.exp(last * math.log1p(-slowest)) / slowest if slowest < 1 else 0.0
        functions = left / typical[:, None]
        return cls(descent, functions, missing, rest, last)

    def pairs(
        self, features: Array, targets: Array, num_steps: int, later: list[int]
    ) -> tuple[list[GaussianPair], Array]:
        """Return the pairs of forgetting each example alone, for several step counts.

        Args:
            features: Feature vectors of training ``(n, d)``.
            targets: ``(n, m)``.
            num_steps: T, steps of training.
            later: Numbers k of unlearning steps.

        Returns:
            A pair for each k: unlearned against retrained. And the slack u, ``(n,)``:
            ``inf`` for examples that must be compared without compression.
        """
        z = features @ self.descent.basis / math.sqrt(self.descent.process.denominator)
        gram = self.products(np.square(z), np.ones(z.shape[1]))
        sound = _well_conditioned(gram)
        slack = np.full(len(z), np.inf)
        empty = np.zeros((len(z), gram.shape[1]))
        found = [GaussianPair(empty, empty, targets.shape[1]) for _ in later]
        if sound.any():
            small = _Small.of(self, z[sound], gram[sound], targets[sound])
            slack[sound] = self._slack(small)
            found = [small.pair(num_steps, k).among(sound) for k in later]
        return found, slack

    def products(self, squares: Array, values: Array) -> Array:
        """Return Σ z²·value·fᵢ·fⱼ over the spectrum, for each example and all i, j.

        Args:
            squares: z², ``(n, d)``.
            values: ``(d,)``.

        Returns:
            float64 ``(n, r, r)``.
        """
        r = self.functions.shape[1]
        i, j = np.tril_indices(r)
        packed = squares @ (
            values[:, None] * self.functions[:, i] * self.functions[:, j]
        )
        places = np.empty((r, r), dtype=np.int64)
        places[i, j] = places[j, i] = np.arange(len(i))
        return packed[:, places]

    def _slack(self, small: "_Small") -> Array:
        """Return u for every example; docs/theory.md, "Ridge heads", derives it."""
        process, squares = self.descent.process, np.square(small.rows)
        eta, penalty = process.learning_rate, process.regularisation
        norm = np.sqrt(squares.sum(axis=1))
        # Σ_j ‖(I − QQᵀ)Aʲz‖, by Cauchy–Schwarz with weights j + 1
        outside = np.sqrt((1 + math.log(self.num_powers)) * (squares @ self.missing))
        outside = outside + norm * self.rest
        leverage = np.minimum(squares @ (eta / self.descent.rates), 1 - 1e-12)
        grown = 1 / (1 - leverage)
        residual = np.linalg.norm(small.residuals, axis=1)
        far = norm * np.linalg.norm(self.descent.optimum) * (1 + grown)
        shift = outside / penalty * (grown * residual + far)
        shift /= math.sqrt(process.noise_variance)
        start = max(1.0, process.initial_variance / process.noise_variance)
        terms = (1 + grown) + (grown * (1 + leverage) + 1 + norm**2 / penalty)
        spread = start * norm * outside / (eta * penalty**2) * terms
        found: Array = shift + small.residuals.shape[1] * spread
        return (1 + _ROUND_OFF) * found


@dataclass(frozen=True)
class _Small:
    """The compressed problems of n examples, in the eigenbasis without each example.

    Attributes:
        compression: What they come from.
        rows: z in the eigenbasis with all rows, ``(n, d)``.
        residuals: (y − xᵀw)/√N at the ridge solution w with all examples, ``(n, m)``.
        axes: Coefficients of the basis: Q is z times functions times this,
            ``(n, r, r)``.
        rates: η times the eigenvalues without the example, ``(n, r)``.
        rates_before: With the example, ``(n, r)``.
        turn: From the eigenbasis with the example to that without, ``(n, r, r)``.
    """

    compression: Compression
    rows: Array
    residuals: Array
    axes: Array
    rates: Array
    rates_before: Array
    turn: Array

    @classmethod
    def of(
        cls, compression: Compression, z: Array, gram: Array, targets: Array
    ) -> "_Small":
        """Return the problems of examples whose Gram matrices are well-conditioned."""
        descent, squares = compression.descent, np.square(z)
        root, eta = (
            math.sqrt(descent.process.denominator),
            descent.process.learning_rate,
        )
        inverse = np.linalg.inv(np.linalg.cholesky(gram))
        inner = inverse @ compression.products(squares, descent.rates)
        inner = inner @ _transposed(inverse)
        small_z = (inverse @ (squares @ compression.functions)[:, :, None])[:, :, 0]
        before, first = np.linalg.eigh(_symmetric(inner))
        outer = small_z[:, :, None] * small_z[:, None, :]
        rates, second = np.linalg.eigh(_symmetric(inner - eta * outer))
        low = eta * descent.process.regularisation
        return cls(
            compression,
            z,
            targets / root - z @ descent.optimum,
            _transposed(inverse) @ second,
            np.clip(rates, low, 1.0),
            np.clip(before, low, 1.0),
            _transposed(second) @ first,
        )

    def pair(self, num_steps: int, later: int) -> GaussianPair:
        """Return unlearned against retrained after T + k steps.

        Args:
            num_steps: T.
            later: k.
        """
        process = self.compression.descent.process
        total, left = num_steps + later, decay(self.rates, later)
        shift = left[:, :, None] * self._shift(num_steps)
        change = self._changed(num_steps) * left[:, :, None] * left[:, None, :]
        # the covariance of retraining, restricted to the directions that differ
        variances = process.variances(self.compression.descent.rates, total)
        whole = self.compression.products(np.square(self.rows), 1 / variances)
        whole = _transposed(self.axes) @ whole @ self.axes
        retrained = np.linalg.inv(whole) - self._changed(total)
        inverse = np.linalg.inv(np.linalg.cholesky(_symmetric(retrained)))
        spread = inverse @ change @ _transposed(inverse)
        betas, turn = np.linalg.eigh(_symmetric(spread))
        means = _transposed(turn) @ (inverse @ shift)
        return GaussianPair(betas, np.square(means).sum(axis=2), shift.shape[2])

    def _changed(self, num_steps: int) -> Array:
        """Return the covariance with the example minus that without, after k steps."""
        process = self.compression.descent.process
        before = process.variances(self.rates_before, num_steps)
        with_row = (self.turn * before[:, None, :]) @ _transposed(self.turn)
        return with_row - _diagonal(process.variances(self.rates, num_steps))

    def _shift(self, num_steps: int) -> Array:
        """Return the mean with the example minus that without, after T steps."""
        descent, functions = self.compression.descent, self.compression.functions
        left, left_before = (
            decay(rates, num_steps) for rates in (self.rates, self.rates_before)
        )
        z = np.square(self.rows) @ functions
        z = (_transposed(self.axes) @ z[:, :, None])[:, :, 0]
        pushed = (1 - left) * z * (descent.process.learning_rate / self.rates)
        found: Array = pushed[:, :, None] * self.residuals[:, None, :]
        powers = _diagonal(left)
        powers -= (self.turn * left_before[:, None, :]) @ _transposed(self.turn)
        d, r = functions.shape
        both = (functions[:, :, None] * descent.optimum[:, None, :]).reshape(d, -1)
        optimum = (self.rows @ both).reshape(len(z), r, -1)
        return found + powers @ (_transposed(self.axes) @ optimum)


def widened(epsilons: Array, slack: Array, delta: float) -> Array:
    """Return τ for each example: ε + 2τ at δ holds for the true distributions.

    It needs ε at (1 − 1e-9)·e^{−τ}·δ of the distributions that were used.

    Args:
        epsilons: Upper limits of ε at a smaller δ, ``(n,)``.
        slack: u, ``(n,)``.
        delta: δ.
    """
    rare = np.logaddexp(0.0, epsilons + 1) - math.log(1e-9 * delta)
    return slack * (1 + 4 * rare)


def _well_conditioned(gram: Array) -> NDArray[np.bool_]:
    """Return which Gram matrices are, after their diagonals were scaled to 1."""
    size = np.sqrt(np.einsum("nii->ni", gram))
    size = np.where(size > 0, size, 1.0)
    least = np.linalg.eigvalsh(gram / size[:, :, None] / size[:, None, :])[:, 0]
    sound: NDArray[np.bool_] = least > _PIVOT
    return sound


def _sampled_powers(rates: Array) -> Array:
    """Return powers from 0 to where the largest eigenvalue has vanished."""
    last = max(_last_power(rates), _DENSE_POWERS + 1)
    count = max(2, int(math.log(last / _DENSE_POWERS) / math.log(_GROWTH)))
    later = np.round(np.geomspace(_DENSE_POWERS, last, count))
    return np.unique(np.append(np.arange(float(_DENSE_POWERS)), later))


def _last_power(rates: Array) -> int:
    """Return the power at which the largest eigenvalue of A is negligible."""
    slowest = float(rates.min())
    return 1 if slowest >= 1 else 1 + int(_NEGLIGIBLE / -math.log1p(-slowest))


def _powers(rates: Array, powers: NDArray[Any]) -> Array:
    """Return a^j for every eigenvalue and power; 0⁰ is 1."""
    logs = np.log(np.maximum(1 - rates, 1e-300))
    found: Array = np.exp(powers * logs[:, None])
    return found


def _transposed(matrices: Array) -> Array:
    """Return the transposes of a stack of matrices."""
    return np.swapaxes(matrices, -1, -2)


def _symmetric(matrices: Array) -> Array:
    """Return the symmetric parts of a stack of matrices."""
    return (matrices + _transposed(matrices)) / 2


def _diagonal(entries: Array) -> Array:
    """Return a stack of diagonal matrices."""
    return entries[:, :, None] * np.eye(entries.shape[1])
