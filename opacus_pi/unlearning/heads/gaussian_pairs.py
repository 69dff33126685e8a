r"""Rényi and hockey-stick divergences of two Gaussian distributions.

Any two Gaussian distributions P and Q of weights can be brought to diagonal form by one
linear map, which changes no divergence. Then every coordinate i of every column c is
independent, N(d_ic, 1 + β_i) under P and N(0, 1) under Q. Two things are left of the
laws: the β_i, and q_i = Σ_c d_ic². With L = ln(dP/dQ) and m columns

:math:`\Lambda(z) = \ln E_Q e^{zL} = \frac{z(z-1)}{2} \sum_i \frac{q_i}{1-(z-1)\beta_i}
- \frac{m}{2} \sum_i [\ln(1-(z-1)\beta_i) + (z-1)\ln(1+\beta_i)]`,

which is (α − 1)·D_α(P ‖ Q) at z = α. It is finite for complex z with
1 < Re z < 1 + 1/max β, and its inverse Mellin transform is the hockey-stick divergence,

:math:`\delta(\varepsilon) = \frac{1}{2\pi i} \int_{c-i\infty}^{c+i\infty}
\frac{e^{\Lambda(z) - (z-1)\varepsilon}}{z(z-1)}\,dz`.

The trapezoidal rule computes it. Two errors are bounded and added to δ: that of the
rule, from the integrand's size on two lines beside the contour, and that of the part of
the line that is left out, where the size of the integrand decreases.

**What breaks it.** Rounding of float64, which is not covered: δ has about 12 digits.

>>> pair = GaussianPair(np.zeros((1, 1)), np.ones((1, 1)), 1)  # a shift of one std
>>> from opacus_pi.accounting.conversion import gaussian_epsilon
>>> float(pair.epsilons(1e-5)[0]) / float(gaussian_epsilon(1.0, 1e-5)) - 1 < 1e-9
True

Source: docs/theory.md, "Ridge heads". For the rule's error, Trefethen and Weideman 2014
(The exponentially convergent trapezoidal rule), Theorem 5.1.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.conversion import check_delta, epsilon_offset

Array = NDArray[np.float64]
Complex = NDArray[np.complexfloating[Any, Any]]

ORDERS: Array = 1 + np.geomspace(0.02, 1e6, 140)
"""Rényi orders at which divergences are converted to ε."""
_BLOCK = 100_000  # numbers in one block of orders
_NODES = (64, 512, 4096)  # half-lines of these sizes are tried in turn
_RULE_DIGITS = 34.0  # the rule's relative error on one line is about exp(−this)
_NEWTON_STEPS = 7
_HALVINGS = 60
_MARGIN = 1e-10  # relative, added to ε for the end of the root search


@dataclass(frozen=True)
class GaussianPair:
    """Pairs of Gaussian distributions in diagonal form, one for each example or set.

    Attributes:
        variances: β_i, variances under P minus 1, float64 ``(n, r)``, above −1.
        squares: q_i, squared differences of the means over all columns, ``(n, r)``.
        num_columns: Number m of columns, which share the variances.
    """

    variances: Array
    squares: Array
    num_columns: int

    def reversed(self) -> "GaussianPair":
        """Return the pairs with the roles of P and Q exchanged."""
        stretch = 1 + self.variances
        return GaussianPair(
            -self.variances / stretch, self.squares / stretch, self.num_columns
        )

    def select(self, chosen: NDArray[np.bool_]) -> "GaussianPair":
        """Return some of the pairs.

        Args:
            chosen: bool ``(n,)``.
        """
        return GaussianPair(
            self.variances[chosen], self.squares[chosen], self.num_columns
        )

    def among(self, chosen: NDArray[np.bool_]) -> "GaussianPair":
        """Return these pairs at the chosen places, and equal distributions elsewhere.

        Args:
            chosen: bool ``(N,)``, true at n places.
        """
        wide = np.zeros((2, len(chosen), self.variances.shape[1]))
        wide[:, chosen] = self.variances, self.squares
        return GaussianPair(wide[0], wide[1], self.num_columns)

    @property
    def widest(self) -> Array:
        """Largest w = Re z − 1 at which Λ is finite, float64 ``(n,)``."""
        largest = self.variances.max(axis=1)
        with np.errstate(divide="ignore"):
            found: Array = np.where(largest > 0, 1 / np.maximum(largest, 0), np.inf)
        return found

    def divergences(self, orders: Array) -> Array:
        """Return D_α(P ‖ Q) for every pair.

        Args:
            orders: Rényi orders above 1, ``(K,)``.

        Returns:
            float64 ``(K, n)``, in nats; ``inf`` where it is infinite.
        """
        logs = np.log1p(self.variances).sum(axis=1)
        number = max(1, _BLOCK // max(1, self.variances.size))
        found = []
        for start in range(0, len(orders), number):
            w = orders[start : start + number, None] - 1.0
            lost = w[:, :, None] * self.variances
            finite = lost.max(axis=2) < 1
            lost = np.where(finite[:, :, None], lost, 0.0)
            shift = (w + 1) / 2 * (self.squares / (1 - lost)).sum(axis=2)
            spread = np.log1p(-lost).sum(axis=2) / w + logs
            value = shift - self.num_columns / 2 * spread
            found.append(np.where(finite, value, np.inf))
        values: Array = np.maximum(np.concatenate(found), 0.0)
        return values

    def log_moments(self, w: Complex) -> Complex:
        """Return Λ(1 + w).

        Args:
            w: Complex points, ``(n, J)``, with real parts below ``widest``.

        Returns:
            complex128 ``(n, J)``.
        """
        pulls, logs = np.zeros_like(w), np.zeros_like(w)
        product, angle = np.ones_like(w), np.zeros(len(w))
        for beta, square in zip(self.variances.T, self.squares.T, strict=True):
            room = 1 - w * beta[:, None]
            pulls += square[:, None] / room
            # The angle of a factor grows along a line: the last point has the largest.
            turned = np.abs(np.angle(room[:, -1]))
            if (angle + turned).max() >= math.pi:  # ln of the product would jump
                logs += np.log(product)
                product, angle = np.ones_like(w), np.zeros(len(w))
            product *= room
            angle += turned
        logs += np.log(product) + w * np.log1p(self.variances).sum(axis=1)[:, None]
        found: Complex
        found = w * (w + 1) / 2 * pulls - self.num_columns / 2 * logs
        return found

    def renyi_epsilons(self, delta: float) -> tuple[Array, Array]:
        """Return ε by conversion of the divergences at ``ORDERS``, and the order used.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε, at least 0, and the order of the smallest value; float64 ``(n,)`` each.
        """
        check_delta(delta)
        values = self.divergences(ORDERS) + epsilon_offset(ORDERS, delta)[:, None]
        best = values.argmin(axis=0)
        least = np.take_along_axis(values, best[None], axis=0)[0]
        return np.maximum(least, 0.0), ORDERS[best]

    def epsilons(self, delta: float) -> Array:
        """Return the smallest ε with δ(ε) ≤ δ, by the hockey-stick, rounded up.

        Args:
            delta: δ in (0, 1).

        Returns:
            float64 ``(n,)``, at least 0, never above ``renyi_epsilons``.
        """
        bounds, orders = self.renyi_epsilons(delta)
        found: Array = bounds.copy()
        open_ = np.isfinite(bounds) & (bounds > 0)
        for num_nodes in _NODES:
            if not open_.any():
                break
            line = _Contour.of(self.select(open_), orders[open_] - 1, num_nodes)
            least, settled = line.roots(bounds[open_], delta)
            where = np.flatnonzero(open_)
            found[where] = np.minimum(found[where], least)
            open_[where[settled]] = False
        return found


@dataclass(frozen=True)
class _Contour:
    """Λ on the nodes of one vertical line per pair, and the errors of the rule."""

    points: Complex  # w = z − 1, (n, J + 1)
    logs: Complex  # Λ + ln of the weight and 1/(z(z − 1))
    lines: tuple[tuple[Array, Array], ...]  # (w, ln of the error's factor) of each
    last: NDArray[np.floating[Any]]  # ln of the factor of what is left out, at Re w

    @classmethod
    def of(cls, pair: GaussianPair, w: Array, num_nodes: int) -> "_Contour":
        """Return the nodes on the line through the given w.

        Args:
            pair: The pairs.
            w: Order minus 1 of each pair's best conversion; moved away from the end
                of the domain if it is close to it.
            num_nodes: J.
        """
        w = np.minimum(w, 0.9 * pair.widest)
        apart = 0.5 * np.minimum(w, pair.widest - w)
        step = 2 * math.pi * apart / _RULE_DIGITS
        heights = step[:, None] * np.arange(num_nodes + 1)
        points = w[:, None] + 1j * heights
        raw = pair.log_moments(points)
        weights = np.log(step / math.pi)[:, None] - np.log(points * (points + 1))
        weights[:, 0] -= math.log(2)
        lines = tuple(
            (
                at,
                pair.log_moments(at[:, None] + 0j)[:, 0].real
                - np.log(at)  # (1/2π)·∫ dt/|z(z−1)| ≤ 1/(2·Re(z − 1))
                - np.log(math.expm1(_RULE_DIGITS)),
            )
            for at in (w - apart, w + apart)
        )
        last = raw[:, -1].real - np.log(math.pi * heights[:, -1])
        return cls(points, raw + weights, lines, last)

    def deltas(self, epsilons: Array) -> tuple[Array, Array]:
        """Return upper bounds on δ(ε), and the slope −dδ/dε.

        Args:
            epsilons: ``(n,)``.
        """
        w = self.points[:, 0].real
        with np.errstate(over="ignore", invalid="ignore"):
            terms = np.exp(self.logs - self.points * epsilons[:, None])
            value = terms.real.sum(axis=1)
            slope = (self.points * terms).real.sum(axis=1)
            for at, factor in (*self.lines, (w, self.last)):
                error = np.exp(factor - at * epsilons)
                value, slope = value + error, slope + at * error
        return np.where(np.isnan(value), np.inf, value), slope

    def roots(self, bounds: Array, delta: float) -> tuple[Array, NDArray[np.bool_]]:
        """Return ε with δ(ε) ≤ δ, at most the bounds, and which of them are settled.

        A pair is settled if the errors that were added are small beside δ.

        Args:
            bounds: Values of ε that are large enough, ``(n,)``.
            delta: δ.
        """
        free = self.deltas(np.zeros_like(bounds))[0] <= delta
        at = bounds.copy()
        for _ in range(_NEWTON_STEPS):
            value, slope = self.deltas(at)
            with np.errstate(all="ignore"):
                step = np.log(value / delta) * value / slope
            at = np.clip(np.where(np.isfinite(step), at + step, at), 0.0, bounds)
        at = np.minimum(at * (1 + _MARGIN), bounds)
        missed = (self.deltas(at)[0] > delta) & ~free
        if missed.any():
            at = np.where(missed, self._bisected(bounds, delta), at)
        at = np.where(free, 0.0, at)
        w = self.points[:, 0].real
        return at, np.exp(self.last - w * at) < 1e-10 * delta

    def _bisected(self, bounds: Array, delta: float) -> Array:
        """Return the upper ends of a bisection; the bounds where it finds no root."""
        low, high = np.zeros_like(bounds), bounds
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = self.deltas(middle)[0] <= delta
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high
