r"""Moments of one update at complex orders, from which whole runs are composed.

**Idea.** Let L be the privacy loss of one update. Its moment generating function at a
complex number s, E e^{sL}, is a moment of the likelihood ratio of two Gaussian
mixtures, as the Rényi divergence is one at a real order. Here it is evaluated on a line
in the complex plane, s = tilt + iω: the integrals of all frequencies ω share the values
of the likelihood ratio, so that they are one product of matrices.

**Guarantee.** Quadrature by the trapezoid rule, whose error falls exponentially with
the number of nodes. The nodes are doubled until two results agree to 1e-8, which puts
the error of the second below 1e-12; the tests compare it with high precision.

**What breaks it.** Ratios far above 8 together with large tilts need too many nodes;
``composed_epsilon`` does not ask for them.

Source: docs/theory.md, Section 15.

>>> line = Line(tilt=2.0, spacing=0.5, num_frequencies=4)
>>> values = log_transforms(np.array([0.5]), np.array([1.0]), line, REMOVED)
>>> exact = line.points * (line.points + 1) * 0.5**2 / 2
>>> bool(np.abs(values - exact).max() < 1e-12)
True
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ADDED", "REMOVED", "Line", "log_transforms"]

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
REMOVED = "removed"  # L of training with the example against training without it
ADDED = "added"  # L of training without the example against training with it
_SCANNED = 256  # points at which the integrand is looked at to find where it lies
_NEGLIGIBLE = 38.0  # e^-38 of the largest value is left out
_AGREEMENT = 1e-8
_FEWEST, _MOST = 128, 1 << 16  # nodes
_AT_ONCE = 1 << 17  # nodes of several updates together
_COARSE = 12  # of the frequencies, how many products are formed by one matrix


@dataclass(frozen=True)
class Line:
    """Evenly spaced points on a line in the complex plane.

    Args:
        tilt: The real part of all points, above 0.
        spacing: Distance of two points.
        num_frequencies: Number of points; the first is the real number ``tilt``.
    """

    tilt: float
    spacing: float = 0.0
    num_frequencies: int = 1

    @property
    def points(self) -> Complex:
        """The points, complex128 ``(F,)``."""
        frequencies = self.spacing * np.arange(self.num_frequencies)
        return (self.tilt + 1j * frequencies).astype(np.complex128)


def log_transforms(
    ratios: Array, sample_rates: Array, line: Line, direction: str
) -> Complex:
    """Return ln E e^{sL} of single updates at the points s of a line.

    Args:
        ratios: float64 ``(B,)``, clipped norms in units of the noise, above 0.
        sample_rates: float64 ``(B,)``, in (0, 1].
        line: The points.
        direction: ``REMOVED`` or ``ADDED``.

    Returns:
        complex128 ``(B, F)``, continuous along the line and real at its first point.
    """
    result = np.empty((len(ratios), line.num_frequencies), dtype=np.complex128)
    updates = _Updates.found(ratios, sample_rates, line, direction)
    left = np.arange(len(ratios))
    num_nodes = updates.nodes_needed(line)
    while len(left):
        again = []
        for number in np.unique(num_nodes[left]):
            of_number = left[num_nodes[left] == number]
            for part in np.array_split(
                of_number, -(-len(of_number) * int(number) // _AT_ONCE)
            ):
                values, agree = updates.chosen(part).integrals(int(number), line)
                result[part] = values
                again.append(part[~agree & (number < _MOST)])
        left = np.concatenate(again)
        num_nodes[left] *= 2
    return result


@dataclass(frozen=True)
class _Updates:
    """Integrals over the noise z of one update each.

    Args:
        ratios: ``(B,)``.
        rates: ``(B,)``.
        power: The real part of the power of the likelihood ratio.
        sign: Of the imaginary part of that power: of L in the log-likelihood ratio.
        low: ``(B,)``, where the integrand begins to matter.
        high: ``(B,)``, where it ceases to.
    """

    ratios: Array
    rates: Array
    power: float
    sign: int
    low: Array
    high: Array

    @classmethod
    def found(
        cls, ratios: Array, rates: Array, line: Line, direction: str
    ) -> "_Updates":
        """Return updates with the intervals in which their integrands lie."""
        power, sign = (line.tilt + 1, 1) if direction == REMOVED else (-line.tilt, -1)
        ends = 10 + np.maximum(power, 0.0) * ratios
        wide = cls(ratios, rates, power, sign, np.full(len(ratios), -10.0), ends)
        z = wide.nodes(_SCANNED)
        logs = power * wide.log_likelihood_ratios(z) - z * z / 2
        matter = logs > logs.max(axis=1, keepdims=True) - _NEGLIGIBLE
        step = (z[:, 1] - z[:, 0]) if len(z) else ends
        rows = np.arange(len(ratios))
        low = z[rows, matter.argmax(axis=1)] - step
        high = z[rows, _SCANNED - 1 - matter[:, ::-1].argmax(axis=1)] + step
        return cls(ratios, rates, power, sign, low, high)

    def chosen(self, places: NDArray[np.int64]) -> "_Updates":
        """Return some of the updates."""
        of = (self.ratios[places], self.rates[places])
        return _Updates(*of, self.power, self.sign, self.low[places], self.high[places])

    def nodes(self, number: int) -> Array:
        """Return evenly spaced values of the noise in each interval, ``(B, Z)``."""
        return np.linspace(self.low, self.high, number, axis=1)

    def log_likelihood_ratios(self, z: Array) -> Array:
        """Return ln of the density with the example over that without it, at z."""
        r = self.ratios[:, None]
        ratios: Array = np.log1p(self.rates[:, None] * np.expm1(r * z - r * r / 2))
        return ratios

    def nodes_needed(self, line: Line) -> NDArray[np.int64]:
        """Return how many nodes follow the oscillations, a power of two, ``(B,)``."""
        y = self.ratios * self.high - self.ratios**2 / 2 + np.log(self.rates)
        steepest = self.ratios / (1 + np.exp(np.minimum(-y, 700)) * (1 - self.rates))
        fastest = line.spacing * (line.num_frequencies - 1) * steepest
        wanted = (self.high - self.low) * np.maximum(fastest / 2.5, 4.0)
        number = 2 ** np.ceil(np.log2(np.maximum(wanted, _FEWEST)))
        nodes: NDArray[np.int64] = np.minimum(number, _MOST).astype(np.int64)
        return nodes

    def integrals(self, number: int, line: Line) -> tuple[Complex, NDArray[np.bool_]]:
        """Return the logarithms of the integrals, and which are known accurately.

        Args:
            number: Number of nodes.
            line: The points.
        """
        z = self.nodes(number)
        logs = self.log_likelihood_ratios(z)
        heights = self.power * logs - z * z / 2
        highest = heights.max(axis=1, keepdims=True)
        weights = np.exp(heights - highest)
        total = weights.sum(axis=1)
        means = (weights * logs).sum(axis=1) / total
        logs -= means[:, None]
        halves = [
            _fourier_sums(weights[:, i::2], self.sign * logs[:, i::2], line)
            for i in (0, 1)
        ]
        agree = (np.abs(halves[0] - halves[1]).max(axis=1)) <= _AGREEMENT * total
        sums = (halves[0] + halves[1]) / total[:, None]
        step = (self.high - self.low) / (number - 1)
        moments = highest[:, 0] + np.log(total * step / math.sqrt(2 * math.pi))
        values = moments[:, None] + np.log(np.maximum(np.abs(sums), 1e-150))
        frequencies = line.points.imag
        phases = np.unwrap(np.angle(sums), axis=1)
        phases += self.sign * means[:, None] * frequencies
        return values + 1j * phases, agree


def _fourier_sums(weights: Array, values: Array, line: Line) -> Complex:
    """Return Σ weight · e^{iω value} at the frequencies ω of a line, ``(B, F)``.

    A frequency is a multiple of a coarse spacing plus a remainder, so that the sums are
    a product of two small matrices instead of one exponential for each term.
    """
    num_fine = -(-line.num_frequencies // _COARSE)
    coarse = _powers(np.exp(1j * line.spacing * num_fine * values), _COARSE)
    coarse *= weights[:, None, :]
    fine = _powers(np.exp(1j * line.spacing * values), num_fine)
    sums = (coarse @ fine.swapaxes(1, 2)).reshape(len(weights), -1)
    found: Complex = sums[:, : line.num_frequencies]
    return found


def _powers(bases: Complex, number: int) -> Complex:
    """Return the powers 0, 1, … of some numbers ``(B, Z)``, ``(B, number, Z)``."""
    powers = np.empty((len(bases), number, bases.shape[1]), dtype=np.complex128)
    powers[:, 0] = 1
    for k in range(1, number):
        np.multiply(powers[:, k - 1], bases, out=powers[:, k])
    return powers
