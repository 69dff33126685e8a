"""Simulated unlearning runs of known truth, for the judges of *farther* and *slower*.

The gap before unlearning and the speed of a set are its own (all trainings share them,
as they share its examples and oracles). Every training multiplies both, and may do so
with a slope of its own along the difficulty. Oracles vary, and so does every measured
value. The sizes are those of accuracies on forget sets of 200 images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.order import judge_farther, judge_slower
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.scenario import Rng, Scenario
from benchmarks.reproduce.judging.verdicts import Verdict

Floats = NDArray[np.float64]
SEEDS, SETS, ORACLES, EPOCHS = 5, 20, 3, 12


@dataclass(frozen=True)
class Truth:
    """What is true in a simulated study; hardness runs from -0.5 to 0.5.

    Attributes:
        sets: Number of sets.
        seeds: Number of trainings.
        oracles: Number of oracles of each set.
        epochs: Epochs of a run.
        start: Mean gap before unlearning.
        farther: How much the gap grows from the easiest to the hardest set.
        gaps: Standard deviation of the gaps of sets of one difficulty.
        speed: Share of the gap that is closed in an epoch, about.
        slower: By which factor the speed falls, as a power of e.
        speeds: Standard deviation of the logarithm of the speed.
        slopes: Standard deviation of the slope of a training, of gap and of log speed.
        together: All sets close their gap at a constant pace and arrive in one epoch.
        oracle_noise: Standard deviation of an oracle, on the easiest and the hardest
            set.
        at_ends: Further standard deviation of the oracles at both ends.
        damage: Test accuracy that the method costs.
        beyond: Share of the gap by which the runs go too far.
        moved: By how much the metric moves on all images, retained ones too, at once
            after the start.
        fades: Epochs after which only a third of this movement is left; 0: it stays.
        alone: Only retained images move, and forget sets do not.
        unseen: How many more errors than the oracles the model makes on images that it
            has never seen, such as test images, and on forgotten ones in the end.
        too_far: By how much all sets go too far, on top of their path, in the fourth
            epoch and those around it.
    """

    sets: int = SETS
    seeds: int = SEEDS
    oracles: int = ORACLES
    epochs: int = EPOCHS
    start: float = 0.4
    farther: float = 0.0
    gaps: float = 0.08
    speed: float = 0.12
    slower: float = 0.0
    speeds: float = 0.4
    slopes: float = 0.0
    together: bool = False
    oracle_noise: tuple[float, float] = (0.03, 0.03)
    at_ends: float = 0.0
    damage: float = 0.0
    beyond: float = 0.0
    moved: float = 0.0
    fades: float = 0.0
    alone: bool = False
    unseen: float = 0.0
    too_far: float = 0.0

    def but(self, **changes: object) -> "Truth":
        """Return a copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def draw_runs(rng: Rng, truth: Truth) -> Runs:
    """Draw the runs of one study."""
    hardness = np.linspace(-0.5, 0.5, truth.sets)
    of_trainings = (truth.seeds, 1)

    def slopes() -> Floats:
        """Draw the factor of every training on every set, as a logarithm."""
        level = 0.1 * rng.normal(size=of_trainings)
        slope = truth.slopes * rng.normal(size=of_trainings)
        return np.asarray(level + slope * hardness)

    of_sets = truth.gaps * rng.normal(size=truth.sets)
    gap = np.maximum(truth.start + truth.farther * hardness + of_sets, 0)
    pace = truth.speeds * rng.normal(size=truth.sets) - truth.slower * hardness
    gap, speed = gap * (1 + slopes()), truth.speed * np.exp(pace + slopes())
    elapsed = speed[:, :, None] * np.arange(truth.epochs + 1)
    left = np.maximum(0, 1 - elapsed) if truth.together else np.exp(-elapsed)
    path = gap[:, :, None] * ((1 + truth.beyond) * left - truth.beyond)
    path = path - truth.unseen * (1 - left)
    path = path - truth.too_far * np.exp(-((np.arange(path.shape[2]) - 4) ** 2) / 2)
    noise = 0.02 * rng.normal(size=path.shape)
    errors = np.linspace(*truth.oracle_noise, truth.sets)
    errors = errors + truth.at_ends * 4 * hardness**2
    oracles = errors * rng.normal(size=(truth.oracles, truth.sets))
    mean = oracles.mean(0)
    lost = (
        truth.damage + truth.unseen + 0.01 * rng.normal(size=(truth.seeds, truth.sets))
    )
    moved = np.broadcast_to(_movement(truth), path.shape)
    if truth.moved:  # of a sample of the retained images, and not the same in each run
        moved = moved * (1 + 0.15 * rng.normal(size=(truth.seeds, 1, 1)))
    seen = moved + 0.005 * rng.normal(size=path.shape) * (np.arange(path.shape[2]) > 0)
    gaps = noise - path - mean[:, None] + (0.0 if truth.alone else moved)
    of_sets = np.exp(4 * hardness), gaps, lost, oracles - mean, seen
    return Runs(*of_sets, counts_errors=True)


def _movement(truth: Truth) -> Floats:
    """Return the mean movement of the metric on all images, ``(epochs + 1,)``."""
    since = np.arange(truth.epochs + 1.0) - 1
    left = np.exp(-since / truth.fades) if truth.fades else np.ones_like(since)
    return truth.moved * np.where(since < 0, 0.0, left)


def _damaged_set(runs: Runs) -> Runs:
    """Return runs of which those on one set lose 30 points of test accuracy."""
    lost = runs.lost.copy()
    lost[:, -1] += 0.3
    return replace(runs, lost=lost)


def _overshot_set(runs: Runs) -> Runs:
    """Return runs of which those on the easiest set go 20 points too far."""
    gaps = runs.gaps.copy()
    gaps[:, 0, 1:] = 0.2
    return replace(runs, gaps=gaps)


def _incomplete(runs: Runs) -> Runs:
    """Return runs with one value that is NaN, and one that is infinite."""
    gaps, lost = runs.gaps.copy(), runs.lost.copy()
    gaps[1, 3, 0], lost[0, 0] = np.inf, np.nan
    return replace(runs, gaps=gaps, lost=lost)


def _scenario(
    claim: str,
    judge: Callable[[Runs], Verdict],
    name: str,
    effect: bool,
    truth: Truth,
    change: Callable[[Runs], Runs] = lambda runs: runs,
) -> Scenario:
    return Scenario(
        claim,
        name,
        effect,
        lambda r: judge(change(draw_runs(r, truth))),
        draws=200 if judge is judge_slower else 400,
    )


PLAIN = Truth()
SLOW = PLAIN.but(slower=1.5)
_NOISY = (0.01, 0.15)  # oracles of hard sets vary more
_FARTHER = "hard sets are farther (1 left and middle, 6-8, private, rates, methods)"
_SLOWER = "hard sets are slower (1 left and middle, 5-8, private, rates, methods)"

_MOVED = PLAIN.but(start=0.3, farther=0.44, gaps=0.02, speed=0.04, speeds=0.1, epochs=8)
_NEAR = PLAIN.but(start=0.12, farther=0.3, gaps=0.06)
_ALONE = PLAIN.but(  # about as measured on Fashion-MNIST
    start=0.3,
    farther=0.8,
    gaps=0.02,
    speed=0.2,
    speeds=0.1,
    epochs=10,
    oracle_noise=(0.015, 0.015),
    alone=True,
)
_FARTHER_NULLS = {
    "sets in random order": PLAIN,
    "hard sets slower": SLOW,
    "hard sets nearer": PLAIN.but(farther=-0.3),
    "equal gaps": PLAIN.but(gaps=0.0),
    "gaps of five points": PLAIN.but(start=0.05, gaps=0.0),
    "oracles of hard sets vary more": PLAIN.but(gaps=0.0, oracle_noise=_NOISY),
    "the same, near five points": PLAIN.but(start=0.06, gaps=0.0, oracle_noise=_NOISY),
    "oracles vary more at both ends": PLAIN.but(gaps=0.0, at_ends=0.2),
    "trainings differ in slope": PLAIN.but(slopes=0.5),
    "the same, 4 trainings": PLAIN.but(slopes=0.5, seeds=4),
    "trainings differ in slope, equal gaps": PLAIN.but(slopes=0.5, gaps=0.0),
}
_SLOWER_NULLS = {
    "sets in random order": PLAIN,
    "equal speed, hard sets farther": PLAIN.but(farther=0.5),
    "all arrive in one epoch, hard sets farther": PLAIN.but(
        farther=0.6, speeds=0.0, together=True, speed=0.08
    ),
    "hard sets 7 times faster and farther": PLAIN.but(slower=-2.0, farther=0.4),
    "hard sets farther, easy ones near five points": PLAIN.but(
        start=0.25, farther=0.4, speeds=0.0
    ),
    "oracles of hard sets vary more": PLAIN.but(oracle_noise=_NOISY),
    "the same, equal speed, farther": PLAIN.but(
        oracle_noise=_NOISY, speeds=0.0, farther=0.5
    ),
    "oracles vary more at both ends": PLAIN.but(at_ends=0.1, speeds=0.1),
    "trainings differ in slope": PLAIN.but(slopes=0.5),
    "the same, 4 trainings": PLAIN.but(slopes=0.5, seeds=4),
    "trainings differ in slope, equal speed": PLAIN.but(slopes=0.5, speeds=0.0),
    "equal speed, farther, 8 epochs": _MOVED,
    "the same, all images lose 4 points": _MOVED.but(moved=0.04),
    "the same, all images lose 2 points": _MOVED.but(moved=0.02),
    "nothing unlearned, all images lose 4 points": _MOVED.but(
        moved=0.04, speed=0.0, start=0.2, farther=0.24
    ),
    "equal speed, all images lose 10 points for some epochs": _MOVED.but(
        moved=0.1, fades=2.0
    ),
    "equal speed, all images lose 20 points": _MOVED.but(moved=0.2),
    "equal speed, retained images alone gain 3 points": _ALONE.but(moved=-0.03),
    "equal speed, forgotten and test images 2 points worse": _ALONE.but(unseen=0.02),
    "many sets near five points": _NEAR,
    "nothing unlearned, near five points": PLAIN.but(start=0.06, gaps=0.02, speed=0),
    "the same, hard sets farther": PLAIN.but(start=0.1, farther=0.15, speed=0),
    "hardly unlearned, near five points": PLAIN.but(start=0.08, gaps=0.03, speed=0.05),
    "nothing to forget": PLAIN.but(start=0.0, gaps=0.0),
    "hard sets slower, all overshoot": SLOW.but(beyond=0.4),
    "hard sets slower, model damaged": SLOW.but(damage=0.2),
    "hard sets slower, 4 epochs": SLOW.but(epochs=4),
    "hard sets slower, 2 oracles": SLOW.but(oracles=2),
    "five strata": SLOW.but(sets=5),
}
_NEVER = {
    "hard sets slower, one set damaged": _damaged_set,
    "hard sets slower, easiest set overshot": _overshot_set,
    "hard sets slower, a value infinite": _incomplete,
}
_FARTHER_CLAIMS = {
    "30 points farther": PLAIN.but(farther=0.3),
    "20 points farther": PLAIN.but(farther=0.2),
    "30 points farther, trainings differ in slope": PLAIN.but(farther=0.3, slopes=0.3),
    "30 points farther, 10 sets": PLAIN.but(farther=0.3, sets=10),
    "10 points farther": PLAIN.but(farther=0.1),
    "3 points farther": PLAIN.but(farther=0.03),
}
_SLOWER_CLAIMS = {
    "4.5 times slower": SLOW,
    "2.7 times slower": PLAIN.but(slower=1.0),
    "4.5 times slower and farther": SLOW.but(farther=0.4),
    "4.5 times slower, trainings differ in slope": SLOW.but(slopes=0.3),
    "4.5 times slower, 8 epochs": SLOW.but(epochs=8),
    "4.5 times slower, 8 epochs, 3 % an epoch": SLOW.but(epochs=8, speed=0.03),
    "4.5 times slower, 5 oracles": SLOW.but(oracles=5),
    "2.7 times slower, MIA of all images falls by 3 points": _MOVED.but(
        moved=-0.03, speed=0.12, slower=1.0
    ),
    "1.6 times slower, the same": _MOVED.but(moved=-0.03, speed=0.12, slower=0.5),
    "1.6 times slower, all images lose 3 points": _MOVED.but(
        moved=0.03, speed=0.12, slower=0.5
    ),
    "2.7 times slower, many sets near five points": _NEAR.but(slower=1.0),
    "4.5 times slower, 12 sets": SLOW.but(sets=12),
    "1.3 times slower, retained images alone lose 4 points": _ALONE.but(
        moved=0.04, slower=0.3
    ),
    "1.3 times slower, forgotten and test images 3 points better": _ALONE.but(
        unseen=-0.03, slower=0.3
    ),
    "2.7 times slower, some sets of no gap": _ALONE.but(slower=1.0),
}

SCENARIOS = [
    *(
        _scenario(claim, judge, name, effect, truth)
        for claim, judge, effect, some in (
            (_FARTHER, judge_farther, False, _FARTHER_NULLS),
            (_FARTHER, judge_farther, True, _FARTHER_CLAIMS),
            (_SLOWER, judge_slower, False, _SLOWER_NULLS),
            (_SLOWER, judge_slower, True, _SLOWER_CLAIMS),
        )
        for name, truth in some.items()
    ),
    *(
        _scenario(_SLOWER, judge_slower, name, False, SLOW, change)
        for name, change in _NEVER.items()
    ),
    _scenario(_FARTHER, judge_farther, "a value infinite", False, PLAIN, _incomplete),
    Scenario(
        _SLOWER,
        "equal speed, all sets too far by 4.5 points for some epochs",
        False,
        lambda r: judge_slower(draw_runs(r, _ALONE.but(too_far=0.045))),
        fools=True,
        draws=200,
    ),
]
