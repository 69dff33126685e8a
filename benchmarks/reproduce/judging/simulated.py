"""How often each judge errs, by simulation with known truth.

A scenario draws the numbers of a study in which the truth is known, and asks a judge.
*Without the effect*, "borne out" is an error: its rate is the size of the judge. *With
the effect*, "borne out" is right: its rate is the power, and "not borne out" is an
error. In all scenarios about forgetting, sets differ at random, in a way that all seeds
share, as they share examples and oracles; seeds vary within sets.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging.budgets import judge_gain
from benchmarks.reproduce.judging.contrasts import (
    alike,
    groups_differ,
    positive,
    shrinks,
)
from benchmarks.reproduce.judging.examples import above, ahead
from benchmarks.reproduce.judging.order import Runs, judge_order, rising
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    combined,
    of_interval,
)

Floats = NDArray[np.float64]
Rng = np.random.Generator
KINDS = (BORNE_OUT, NOT_BORNE_OUT, UNDECIDED, NOT_TESTABLE)
SEEDS, SETS, EPOCHS = 5, 20, 6
_EXAMPLES = 2_000


@dataclass(frozen=True)
class Scenario:
    """A study of known truth.

    Attributes:
        judge: The judge, and the figures that use it.
        name: What is simulated.
        effect: Whether the claim is true in it.
        draw: Draws the numbers and returns the verdict.
    """

    judge: str
    name: str
    effect: bool
    draw: Callable[[Rng], Verdict]


def rates(scenario: Scenario, draws: int) -> dict[str, float]:
    """Return the share of each verdict over several draws, the same at each call."""
    rng = np.random.default_rng(0)
    found = [scenario.draw(rng).verdict for _ in range(draws)]
    return {kind: found.count(kind) / draws for kind in KINDS}


def runs(
    rng: Rng,
    *,
    sets: int = SETS,
    farther: float = 0.0,
    slower: float = 0.0,
    speed: float = 0.3,
    start: float = 0.4,
    damage: float = 0.0,
) -> Runs:
    """Draw unlearning runs whose sets differ at random, and by difficulty.

    Args:
        rng: Source of the draws.
        sets: Number of sets.
        farther: How much the gap before unlearning grows from easiest to hardest set.
        slower: By which factor the speed falls, as a power of e.
        speed: Share of the gap that is closed in an epoch, about.
        start: Mean gap before unlearning.
        damage: Test accuracy that the method costs.
    """
    hardness = np.linspace(-0.5, 0.5, sets)
    gap = start + farther * hardness + 0.08 * rng.normal(size=sets)
    rate = speed * np.exp(-slower * hardness + 0.4 * rng.normal(size=sets))
    path = np.maximum(gap, 0)[:, None] * np.exp(-rate[:, None] * np.arange(EPOCHS + 1))
    noise = 0.02 * rng.normal(size=(SEEDS, sets, EPOCHS + 1))
    of_oracles = 0.01 * rng.normal(size=(sets, 1))  # shared by all seeds
    lost = damage + 0.01 * rng.normal(size=(SEEDS, sets))
    return Runs(np.exp(4 * hardness), of_oracles + noise - path, lost)


def two_hard_strata(rng: Rng) -> Runs:
    """Draw five sets, three of them without a gap; the others at random."""
    drawn = runs(rng, sets=5)
    paths = drawn.gaps.copy()
    paths[:, :3] *= 0.05
    return Runs(drawn.difficulty, paths, drawn.lost)


def _barriers(rng: Rng, slope: float) -> Verdict:
    hardness = np.linspace(-0.5, 0.5, SETS)
    of_sets = slope * hardness + 0.3 * rng.normal(size=SETS)
    return rising(hardness, of_sets + 0.2 * rng.normal(size=(SEEDS, SETS)))


def _around(rng: Rng, middle: float) -> Floats:
    """Draw values ``(seeds, sets)`` whose sets have this mean."""
    return middle + 0.1 * rng.normal(size=10) + 0.05 * rng.normal(size=(SEEDS, 10))


def _groups(rng: Rng, more: float) -> Verdict:
    first, second = (
        m + 0.2 * rng.normal(size=4) + 0.1 * rng.normal(size=(SEEDS, 4))
        for m in (more, 0.0)
    )
    return groups_differ(first, second, "larger by")


def _accuracies(rng: Rng, apart: float) -> Verdict:
    hard = np.arange(SETS) >= SETS // 2
    of_sets = 0.8 - apart * hard + 0.02 * rng.normal(size=SETS)
    return alike(of_sets + 0.005 * rng.normal(size=(SEEDS, SETS)), 0.05, "accuracy")


def _separations(rng: Rng, small: float, large: float) -> Verdict:
    pair = [runs(rng, farther=one).of_sets()["area"][None] for one in (small, large)]
    return shrinks(*pair, "area")


def _correlations(rng: Rng, rho: float, within: float = 0.01) -> Floats:
    """Draw one correlation per training, all on the same sample of examples."""
    x, noise = rng.normal(size=(2, _EXAMPLES))
    y = rho * x + np.sqrt(1 - rho**2) * noise
    seen = 6 / np.pi * np.arcsin(np.corrcoef(x, y)[0, 1] / 2)  # as ranks would
    return np.clip(seen + within * rng.normal(size=SEEDS), -1, 1)


def _latent(spearman: float) -> float:
    """Return the normal correlation of which this is the rank correlation."""
    return float(2 * np.sin(np.pi * spearman / 6))


def _ahead(rng: Rng, more: float) -> Verdict:
    sample = 0.004 * rng.normal()  # the examples; known to the judge from resampling
    other = 0.95 + 0.002 * rng.normal(size=SEEDS)
    rho = other + more + sample + 0.002 * rng.normal(size=SEEDS)
    found = ahead(rho, other, 0.004 * rng.normal(size=400))
    return Verdict(of_interval(found.low, found.high))


def _both(one: Verdict, other: Verdict) -> Verdict:
    return combined({"UA": one, "MIA": other})


_ORDER = "order of the sets (1, 5-8, private, rates, methods)"
_MEAN = "mean over sets (1 right, 5)"
SCENARIOS = [
    Scenario(_ORDER, "sets in random order", False, lambda r: judge_order(runs(r))),
    Scenario(
        _ORDER,
        "nothing unlearned, hard sets start farther",
        False,
        lambda r: judge_order(runs(r, farther=0.5, speed=0.0)),
    ),
    Scenario(
        _ORDER,
        "nothing to forget",
        False,
        lambda r: judge_order(runs(r, start=-1.0)),
    ),
    Scenario(
        _ORDER,
        "model damaged, hard sets slower",
        False,
        lambda r: judge_order(runs(r, slower=2.0, damage=0.2)),
    ),
    Scenario(
        _ORDER,
        "five strata, three without a gap",
        False,
        lambda r: judge_order(two_hard_strata(r)),
    ),
    Scenario(
        _ORDER,
        "two measures, random order",
        False,
        lambda r: _both(judge_order(runs(r)), judge_order(runs(r))),
    ),
    Scenario(
        _ORDER,
        "hard sets faster",
        False,
        lambda r: judge_order(runs(r, slower=-1.5)),
    ),
    Scenario(
        _ORDER, "hard sets farther", True, lambda r: judge_order(runs(r, farther=0.5))
    ),
    Scenario(
        _ORDER, "hard sets slower", True, lambda r: judge_order(runs(r, slower=1.5))
    ),
    Scenario(
        _ORDER,
        "hard sets slower, 10 sets",
        True,
        lambda r: judge_order(runs(r, sets=10, slower=1.5)),
    ),
    Scenario(
        "rises with difficulty (1 right, 4)",
        "random order",
        False,
        lambda r: _barriers(r, 0.0),
    ),
    Scenario(
        "rises with difficulty (1 right, 4)", "rises", True, lambda r: _barriers(r, 1.2)
    ),
    Scenario(
        _MEAN, "mean of 0", False, lambda r: positive(_around(r, 0.0), "difference")
    ),
    Scenario(
        _MEAN,
        "mean of one standard deviation of sets",
        True,
        lambda r: positive(_around(r, 0.1), "difference"),
    ),
    Scenario(
        "four sets against four (3, methods)",
        "no difference",
        False,
        lambda r: _groups(r, 0.0),
    ),
    Scenario(
        "four sets against four (3, methods)",
        "two standard deviations of sets",
        True,
        lambda r: _groups(r, 0.4),
    ),
    Scenario(
        "accuracies alike (5)",
        "five points apart",
        False,
        lambda r: _accuracies(r, 0.05),
    ),
    Scenario("accuracies alike (5)", "alike", True, lambda r: _accuracies(r, 0.0)),
    Scenario(
        "separation shrinks (8)",
        "equal separation",
        False,
        lambda r: _separations(r, 0.4, 0.4),
    ),
    Scenario(
        "separation shrinks (8)",
        "a fifth of the separation",
        True,
        lambda r: _separations(r, 0.6, 0.12),
    ),
    Scenario(
        "correlation above a limit (2, 9, ranks, literal)",
        "at the limit of 0.9",
        False,
        lambda r: above(_correlations(r, _latent(0.9)), _EXAMPLES, 0.9),
    ),
    Scenario(
        "correlation above a limit (2, 9, ranks, literal)",
        "0.95 against the limit of 0.9",
        True,
        lambda r: above(_correlations(r, _latent(0.95)), _EXAMPLES, 0.9),
    ),
    Scenario(
        "budgets from the loss (predicted)",
        "loss unrelated to gap and speed",
        False,
        lambda r: judge_gain(runs(r, start=0.6)),
    ),
    Scenario(
        "budgets from the loss (predicted)",
        "hard sets farther and slower",
        True,
        lambda r: judge_gain(runs(r, start=0.6, farther=0.9, slower=1.5, speed=0.6)),
    ),
    Scenario("best proxy (2)", "equally good", False, lambda r: _ahead(r, 0.0)),
    Scenario("best proxy (2)", "better by 0.02", True, lambda r: _ahead(r, 0.02)),
]
