"""Every simulated study: those of unlearning runs, and those of the other judges.

In all scenarios about forgetting, sets differ at random, in a way that all seeds share,
as they share examples and oracles; seeds vary within sets.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.judging import simulated_runs
from benchmarks.reproduce.judging.budgets import judge_gain
from benchmarks.reproduce.judging.contrasts import (
    alike,
    groups_differ,
    positive,
    shrinks,
)
from benchmarks.reproduce.judging.examples import above, ahead
from benchmarks.reproduce.judging.order import rising
from benchmarks.reproduce.judging.scenario import Rng, Scenario
from benchmarks.reproduce.judging.simulated_runs import PLAIN, SEEDS, SETS, draw_runs
from benchmarks.reproduce.judging.verdicts import Verdict, of_interval

Floats = NDArray[np.float64]
_EXAMPLES = 2_000


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
    pair = [draw_runs(rng, PLAIN.but(farther=one)).to_go for one in (small, large)]
    return shrinks(*(one[:, :, 0] for one in pair), "gap before unlearning")


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


_MEAN = "mean over sets (1 right, 5)"
SCENARIOS = [
    *simulated_runs.SCENARIOS,
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
        lambda r: judge_gain(draw_runs(r, PLAIN.but(start=0.6))),
    ),
    Scenario(
        "budgets from the loss (predicted)",
        "hard sets farther and slower",
        True,
        lambda r: judge_gain(
            draw_runs(
                r, PLAIN.but(start=0.6, farther=0.9, slower=1.5, speed=0.5, epochs=8)
            )
        ),
    ),
    Scenario("best proxy (2)", "equally good", False, lambda r: _ahead(r, 0.0)),
    Scenario("best proxy (2)", "better by 0.02", True, lambda r: _ahead(r, 0.02)),
]
