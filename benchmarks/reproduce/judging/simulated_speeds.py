"""Simulated runs in which the share of the gap that remains is set for each set.

For the hardest quarter, and for the separation of small and of large sets.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.order import judge_order
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.scenario import Rng, Scenario
from benchmarks.reproduce.judging.speeds import judge_hardest, judge_shrinking
from benchmarks.reproduce.judging.verdicts import Verdict

Floats = NDArray[np.float64]
SEEDS, SETS, ORACLES, EPOCHS = 5, 20, 3, 8
_PLACES = np.linspace(0, 1, SETS)  # in the ranking


def _runs(rng: Rng, start: Floats, speed: Floats) -> Runs:
    """Draw runs with these gaps before unlearning and these speeds."""
    level = np.exp(0.1 * rng.normal(size=(SEEDS, 1, 1)))
    left = np.exp(-speed[:, None] * level * np.arange(EPOCHS + 1))
    oracles = 0.02 * rng.normal(size=(ORACLES, SETS))
    mean = oracles.mean(0)
    noise = 0.01 * rng.normal(size=left.shape)
    lost = 0.01 * rng.normal(size=(SEEDS, SETS))
    gaps = noise - start[:, None] * left - mean[:, None]
    moved = np.zeros_like(gaps)
    return Runs(np.exp(4 * _PLACES), gaps, lost, oracles - mean, moved)


def _hardest(rng: Rng, shares: list[float]) -> Verdict:
    """Draw runs of which each quarter keeps a share of its gap at the end."""
    share = np.repeat(shares, SETS // 4) + 0.02 * rng.normal(size=SETS)
    start = 0.15 + 0.5 * _PLACES + 0.02 * rng.normal(size=SETS)
    runs = _runs(rng, start, -np.log(np.clip(share, 0.05, 0.97)) / EPOCHS)
    return judge_hardest(runs, judge_order(runs))


def _sizes(rng: Rng, slope: float, few: float, many: float) -> Verdict:
    """Draw runs on small and on large sets; easy ones have nothing to forget.

    Args:
        rng: Source of the draws.
        slope: How much faster the speed falls for large sets than for small ones.
        few: Place from which on small sets have something to forget.
        many: The same for large sets.
    """
    both = [_of_size(rng, *one) for one in ((1.0, few), (slope, many))]
    return judge_shrinking(*both)


def _of_size(rng: Rng, slope: float, first: float) -> Runs:
    gap = 0.5 * (_PLACES - first) / (1 - first) + 0.08
    start = np.where(_PLACES < first, 0.01, gap)
    speed = 0.3 * np.exp(-1.6 * slope * _PLACES + 0.1 * rng.normal(size=SETS))
    return _runs(rng, start, speed)


_HARDEST = "hardest quarter slower than the others on average (methods)"
_SIZES = "speeds separate less for large sets (8)"

SCENARIOS = [
    *(
        Scenario(
            _HARDEST, name, effect, lambda r, some=shares: _hardest(r, some), draws=200
        )
        for name, effect, shares in (
            ("as the others' mean, third quarter slowest", False, [0.4, 0.6, 0.8, 0.6]),
            ("all quarters alike", False, [0.6, 0.6, 0.6, 0.6]),
            ("slower than each other quarter", True, [0.3, 0.4, 0.5, 0.8]),
            ("slower than the mean, not than the third", True, [0.2, 0.3, 0.8, 0.7]),
        )
    ),
    *(
        Scenario(
            _SIZES, name, effect, lambda r, some=sizes: _sizes(r, *some), draws=200
        )
        for name, effect, sizes in (
            ("equal, all sets judged at both sizes", False, (1.0, 0.0, 0.0)),
            ("equal, easy sets judged if small only", False, (1.0, 0.0, 0.55)),
            (
                "0.8 times, easy sets judged if large only",
                True,
                (0.8, 0.55, 0.0),
            ),
            ("0.3 times, all sets judged at both sizes", True, (0.3, 0.0, 0.0)),
        )
    ),
]
