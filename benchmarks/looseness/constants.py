"""Cases of constants: ε at a given δ, and LSI constants of bounded distributions."""

import math
from collections.abc import Iterator

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from benchmarks.looseness.case import Array, Case
from opacus_pi.accounting import rdp_to_epsilon
from opacus_pi.accounting.langevin.lsi import bounded_support_lsi

_ORDERS = np.r_[np.linspace(1.01, 20, 400), np.geomspace(20, 2000, 400)[1:]]


def conversions(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield ε of the Gaussian mechanism, from its Rényi curve and exactly."""
    for _ in range(number):
        sigma, delta = 10 ** rng.uniform(-0.5, 1), 10 ** rng.uniform(-9, -2)

        def excess(epsilon: float, s: float = sigma, d: float = delta) -> float:
            far = math.exp(epsilon + log_ndtr(-0.5 / s - epsilon * s))
            return float(ndtr(0.5 / s - epsilon * s)) - far - d

        if excess(0.0) <= 0:
            continue
        curve = _ORDERS / (2 * sigma**2)
        yield Case(
            "ε of the Gaussian mechanism",
            brentq(excess, 0.0, 500.0, xtol=1e-12),
            {"best": float(rdp_to_epsilon(curve, _ORDERS, delta))},
            {
                "Mironov": float(
                    rdp_to_epsilon(curve, _ORDERS, delta, conversion="mironov")
                )
            },
        )


def two_point_laws(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield LSI constants of ±R plus noise N(0, s).

    In one dimension Muckenhoupt's criterion encloses the true constant (Barthe and
    Roberto 2003). Its upper end is used as the exact value here.
    """
    for _ in range(number):
        noise = float(rng.uniform(0.2, 2))
        radius = float(rng.uniform(0.1, 1.2)) * math.sqrt(noise)
        yield Case(
            "LSI constant, bounded distribution plus noise",
            muckenhoupt(radius, noise)[1],
            {"bounded support": bounded_support_lsi(radius, noise)},
        )


def muckenhoupt(radius: float, noise: float) -> tuple[float, float]:
    """Return a lower and an upper bound of the constant C in Ent(f²) ≤ 2C·E f'²."""
    x = np.linspace(0, radius + 12 * math.sqrt(noise), 40_001)
    tail = (ndtr((radius - x) / noise**0.5) + ndtr((-radius - x) / noise**0.5)) / 2
    inverse = 1 / two_point_density(x, radius, noise)
    cells = (inverse[1:] + inverse[:-1]) / 2 * (x[1] - x[0])
    integral = np.concatenate([[0.0], np.cumsum(cells)])
    seen = tail > 1e-30
    tail, integral = tail[seen], integral[seen]
    low = tail * np.log1p(1 / (2 * tail)) * integral
    high = 4 * tail * np.log1p(math.e**2 / tail) * integral
    return float(low.max() / 2), float(high.max() / 2)


def two_point_density(x: Array, radius: float, noise: float) -> Array:
    """Return the density of ±radius with equal chances, plus N(0, noise)."""
    peaks = [np.exp(-((x - m) ** 2) / (2 * noise)) for m in (-radius, radius)]
    return sum(peaks) / (2 * math.sqrt(2 * math.pi * noise))
