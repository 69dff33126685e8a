r"""Contraction of (ε, δ) itself by noisy steps on a bounded domain.

**Idea.** E_γ(P‖Q) = sup_A P(A) − γ·Q(A) is δ at ε = ln γ. Cut the part that P and γQ
share; what is left of P has mass δ, what is left of γQ has mass δ + γ − 1. A noisy step
whose mean has a range of diameter ρ can keep two distributions no further apart than
two Gaussians at that distance. So a step with noise of standard deviation s gives

:math:`\delta_{t+1} = \delta_t\, G\!\left(\tfrac{\rho}{s},\
\ln\!\big(1 + \tfrac{e^\varepsilon - 1}{\delta_t}\big)\right)`,

where G(μ, ε) is δ of a Gaussian shift of μ standard deviations. Several steps may be
taken as one block: then ρ/s is the shift that the whole block leaves of its first map's
range, by shifted divergences (``shifted.shifted_mu_squared``).

**Guarantee.** A bound for every ε, rounded up, in each direction in which the start has
one. With blocks of one step no smaller bound follows from the same assumptions: an
adversary attains it at every step.

**What breaks it.** A map whose range is larger than stated, noise that depends on the
data, or (for longer blocks) maps that differ between the two runs. Random batches are
allowed if both runs share them and each batch's map keeps to the stated numbers.

Source: own derivation, docs/theory.md, Section 8; blocks of one step: Balle et al. 2019
(arXiv:1905.12264), Asoodeh et al. 2020 (arXiv:2012.11035).

>>> float(hockey_stick_contraction(1.0, [2.0] * 100, 0.42)) <= 1e-5
True
>>> round(contraction_noise_std(1.0, 1e-5, [2.0] * 100), 3)
0.42
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive
from opacus_pi.accounting.conversion import check_delta, log_gaussian_delta
from opacus_pi.accounting.langevin.shifted import shifted_mu_squared

__all__ = ["contraction_noise_std", "hockey_stick_contraction"]

Array = NDArray[np.float64]
Start = float | Callable[[float], float]
_SLACK = 1e-12  # upper limit of the relative rounding error of a block's shift
_ULPS = 1e-15
_TOLERANCE = 1e-12  # relative, of a noise that is searched
_EVERY_LENGTH = 32  # longer blocks are tried at lengths 5 % apart
_BEST = "best"


def hockey_stick_contraction(
    epsilon: ArrayLike,
    map_diameters: ArrayLike,
    noise_stds: ArrayLike,
    *,
    initial_delta: Start = 1.0,
    block_length: int | Literal["best"] = 1,
    lipschitz: ArrayLike = math.inf,
    drifts: ArrayLike = 0.0,
) -> Array:
    """Return a bound on δ(ε) between two distributions after N noisy steps.

    A step is w ↦ F_t(w) + noise. Both distributions go through the same steps; a step
    may be followed by a projection onto a convex set. A single number is used for all N
    steps; at least one of ``map_diameters`` and ``noise_stds`` has the length N.

    Args:
        epsilon: ε ≥ 0 at which δ is wanted, any shape.
        map_diameters: ρ_t, ``(N,)``, largest distance of two values of F_t. A step that
            projects onto a ball of radius R and then adds noise has 2R; one that
            projects afterwards has c_t·2R + d_t (see below). Used where a block begins.
        noise_stds: s_t, ``(N,)``, standard deviation of the noise per coordinate.
        initial_delta: A bound on δ before the first step: one number that holds at each
            of the given ε, or a function of ε. 1 holds for any two distributions.
        block_length: j, steps taken as one block. 1 needs a bounded range in every
            step; longer blocks need it in their first step only, hence suit steps that
            project every j steps. ``"best"`` takes the smallest bound, for steps that
            each have the bounded range.
        lipschitz: c_t, ``(N,)``, for blocks of several steps:
            |F_t(w) − F_t(w')| ≤ c_t·|w − w'| + d_t.
        drifts: d_t, ``(N,)``: 0 for smooth losses; 2ηC for a step of learning rate η
            along a gradient clipped to norm C.

    Returns:
        float64 in the shape of ``epsilon``, in [0, 1]: bounds on δ. Both directions
        hold if ``initial_delta`` bounds both.

    Raises:
        ValueError: If lengths differ, or a value is outside its domain.

    Source: docs/theory.md, Section 8.
    """
    steps = _Steps.of(map_diameters, noise_stds, lipschitz, drifts)
    in_range(0, math.inf, epsilon=epsilon, remedy="An epsilon is never negative.")
    eps = numbers("epsilon", epsilon)
    start = _log_start(eps, initial_delta)
    bounds = [
        _contracted(eps, start, steps.shifts(length))
        for length in _lengths(block_length, steps)
    ]
    log_delta = np.min(bounds, axis=0)
    smallest = np.finfo(np.float64).smallest_subnormal
    rounded = np.maximum(np.exp(log_delta) * (1 + 4 * _ULPS), smallest)
    return np.where(np.isneginf(log_delta), 0.0, np.minimum(rounded, 1.0))


def contraction_noise_std(
    epsilon: float,
    delta: float,
    map_diameters: ArrayLike,
    *,
    initial_delta: Start = 1.0,
    block_length: int | Literal["best"] = 1,
    lipschitz: ArrayLike = math.inf,
    drifts: ArrayLike = 0.0,
) -> float:
    """Return the smallest noise, equal in all steps, after which δ(ε) is reached.

    Args:
        epsilon: ε ≥ 0, one number.
        delta: δ in (0, 1) to reach after the last step.
        map_diameters: As in ``hockey_stick_contraction``; its length is the number of
            steps.
        initial_delta: As in ``hockey_stick_contraction``.
        block_length: As in ``hockey_stick_contraction``.
        lipschitz: As in ``hockey_stick_contraction``.
        drifts: As in ``hockey_stick_contraction``.

    Returns:
        Standard deviation per coordinate, rounded up; 0 if the start meets the target,
        and ``inf`` if a map's range is unbounded.

    Raises:
        ValueError: As ``hockey_stick_contraction``.

    Source: bisection of ``hockey_stick_contraction``, which falls with the noise.
    """
    in_range(
        0,
        np.finfo(float).max,
        epsilon=epsilon,
        remedy="Pass a finite epsilon of at least 0.",
    )
    check_delta(delta)
    steps = _Steps.of(map_diameters, 1.0, lipschitz, drifts)
    eps, goal = numbers("epsilon", epsilon), math.log(delta)
    start = _log_start(eps, initial_delta)
    if start <= goal or not steps.diameters.any():
        return 0.0
    blocks = [steps.shifts(length) for length in _lengths(block_length, steps)]
    blocks = [shifts for shifts in blocks if np.isfinite(shifts).all()]
    if not blocks:
        return math.inf

    def log_delta(chosen: int, std: float) -> float:
        return float(_contracted(eps, start, blocks[chosen] / std))

    least, chosen = math.inf, len(blocks) // 2
    while True:
        std = _smallest(
            lambda s: log_delta(chosen, s) <= goal,  # noqa: B023  (used at once)
            float(steps.diameters.max()),
        )
        if not std < least:
            return least
        least = std
        # At this noise the best length is the one to go on with, if there is another.
        chosen = int(np.argmin([log_delta(i, least) for i in range(len(blocks))]))


def _smallest(enough: Callable[[float], bool], guess: float) -> float:
    """Return the smallest number that is enough, rounded up."""
    low = high = guess
    while enough(low):
        low /= 2
    while not enough(high):
        high *= 2
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class _Steps:
    """The steps' numbers, ``(N,)`` each."""

    diameters: Array
    stds: Array
    lipschitz: Array
    drifts: Array

    @classmethod
    def of(
        cls,
        map_diameters: ArrayLike,
        noise_stds: ArrayLike,
        lipschitz: ArrayLike,
        drifts: ArrayLike,
    ) -> "_Steps":
        """Check the arguments and bring them to one length."""
        given = {
            "map_diameters": map_diameters,
            "noise_stds": noise_stds,
            "lipschitz": lipschitz,
            "drifts": drifts,
        }
        arrays = {name: numbers(name, value) for name, value in given.items()}
        remedy = "A distance or Lipschitz constant is never negative."
        in_range(
            0, math.inf, remedy=remedy, map_diameters=map_diameters,
            lipschitz=lipschitz, drifts=drifts,
        )  # fmt: skip
        positive(
            noise_stds=noise_stds, remedy="Pass the std of the noise of every step."
        )
        lengths = {a.size for a in arrays.values() if a.ndim}
        expect(
            len(lengths - {1}) <= 1
            and 0 not in lengths
            and all(a.ndim <= 1 for a in arrays.values()),
            ", ".join(arrays),
            f"shapes {', '.join(str(a.shape) for a in arrays.values())}",
            "must be numbers or share one shape (N,), with at least one step",
            "Give one number for every step, or one for all.",
        )
        size = max(lengths, default=1)
        return cls(*(np.broadcast_to(a, (size,)) for a in arrays.values()))

    def shifts(self, length: int) -> Array:
        """Return the Gaussian shift that bounds each block, rounded up.

        The blocks are consecutive; the last one may be shorter.
        """
        size = len(self.diameters)
        if length == 1:
            return self.diameters / self.stds * (1 + _ULPS)
        every = np.stack([self.diameters, self.stds, self.lipschitz, self.drifts])
        mus = [
            _block_shift(tuple(map(tuple, every[:, at : at + length].tolist())))
            for at in range(0, size, length)
        ]
        return np.array(mus)


@lru_cache(maxsize=256)
def _block_shift(numbers: tuple[tuple[float, ...], ...]) -> float:
    """Return the shift of one block, from its steps' four numbers.

    The first map's values are within its diameter; the distance then goes through the
    other steps' maps, and each step's noise pays for a part of it.
    """
    diameters, stds, lipschitz, drifts = map(np.array, numbers)
    c = np.concatenate([[1.0], lipschitz[1:]])
    d = np.concatenate([diameters[:1], drifts[1:]])
    if not math.isfinite(d.max()) or not math.isfinite(c.max()):
        return math.inf
    return math.sqrt(shifted_mu_squared(c, d, stds**2)) * (1 + _SLACK)


def _lengths(block_length: int | str, steps: _Steps) -> list[int]:
    """Return the block lengths to try."""
    size = len(steps.diameters)
    is_count = isinstance(block_length, int) and not isinstance(block_length, bool)
    expect(
        block_length == _BEST or (is_count and int(block_length) >= 1),
        "block_length",
        repr(block_length),
        'must be a whole number of at least 1, or "best"',
        "Pass 1 if no Lipschitz constants are known.",
    )
    known = bool(np.isfinite(steps.lipschitz).all())
    expect(
        block_length == 1 or known,
        "lipschitz",
        "inf",
        "must be finite for blocks of several steps",
        "Pass lipschitz= and drifts= of the maps, or block_length=1.",
    )
    if block_length != _BEST:
        return [min(int(block_length), size)]
    long = np.geomspace(_EVERY_LENGTH, max(size, _EVERY_LENGTH), 64).round()
    tried = {*range(1, _EVERY_LENGTH + 1), *long.astype(int).tolist()}
    return sorted(j for j in tried if j <= size)


def _log_start(epsilon: Array, initial_delta: Start) -> Array:
    """Return ln δ before the steps, in the shape of ε."""
    if callable(initial_delta):
        found = [float(initial_delta(float(e))) for e in epsilon.ravel()]
        values = np.array(found, np.float64).reshape(epsilon.shape)
    else:
        one = numbers("initial_delta", initial_delta)
        expect(
            one.ndim == 0,
            "initial_delta",
            f"an array of shape {one.shape}",
            "must be one number or a function of epsilon",
            "Pass a function if it differs between the epsilons.",
        )
        values = np.full(epsilon.shape, one)
    in_range(0, 1, initial_delta=values, remedy="Pass a probability.")
    with np.errstate(divide="ignore"):
        return np.log(values)


def _contracted(epsilon: Array, log_delta: Array, shifts: Array) -> Array:
    """Return ln δ after steps or blocks of the given Gaussian shifts, rounded up."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # ln(e^ε − 1) without overflow; −inf at ε = 0
        log_excess = epsilon + np.log(-np.expm1(-epsilon))
        for shift in shifts:
            exponent = log_excess - log_delta
            error = _ULPS * (2 + np.abs(exponent))
            raised = np.logaddexp(0.0, exponent) * np.maximum(1 - error, 0.0)
            raised = np.where(np.isneginf(exponent), 0.0, raised)
            raised = np.where(np.isposinf(exponent), np.inf, raised)
            factor = log_gaussian_delta(shift, raised)
            log_delta = np.minimum(log_delta, log_delta * (1 - _ULPS) + factor)
    return log_delta
