"""Every simulated study: of unlearning runs, and of other values.

In all scenarios about forgetting, sets differ at random, in a way that all seeds share,
as they share examples and oracles; seeds vary within sets.
"""

import numpy as np

from benchmarks.reproduce.judging import (
    simulated_runs,
    simulated_speeds,
    simulated_values,
)
from benchmarks.reproduce.judging.order import rising
from benchmarks.reproduce.judging.scenario import Rng, Scenario
from benchmarks.reproduce.judging.simulated_runs import SEEDS, SETS
from benchmarks.reproduce.judging.verdicts import Verdict, combined


def _barriers(rng: Rng, slope: float) -> Verdict:
    hardness = np.linspace(-0.5, 0.5, SETS)
    of_sets = slope * hardness + 0.3 * rng.normal(size=SETS)
    return rising(hardness, of_sets + 0.2 * rng.normal(size=(SEEDS, SETS)))


def _correlated(rng: Rng, rho: float) -> Verdict:
    """Draw difficulty and values whose population has Spearman's correlation rho."""
    latent = 2 * np.sin(np.pi * rho / 6)
    hardness, noise = rng.normal(size=(2, SETS))
    of_sets = latent * hardness + np.sqrt(1 - latent**2) * noise
    return rising(hardness, of_sets + 0.1 * rng.normal(size=(SEEDS, SETS)))


def _many_parts(rng: Rng, rho: float) -> Verdict:
    return combined({str(part): _correlated(rng, rho) for part in range(12)})


def _two_kinds(rng: Rng, seeds: int) -> Verdict:
    """Draw trainings of which 30 % fall steeply and 70 % rise, about 0 on average."""
    hardness = np.linspace(-0.5, 0.5, SETS)
    slopes = np.where(rng.random(seeds) < 0.3, -3.0, 0.45)[:, None]
    of_sets = slopes * hardness + 0.3 * rng.normal(size=SETS)
    return rising(hardness, of_sets + 0.05 * rng.normal(size=(seeds, SETS)))


def _of_classes(rng: Rng) -> Verdict:
    """Draw ten classes, gap and loss of which are independent, as windows of the loss.

    Over sets of these classes there is a trend, over other classes there is none.
    """
    labels = np.repeat(np.arange(10), 1_000)
    losses = 0.6 * rng.normal(size=10)[labels] + rng.normal(size=len(labels))
    wrong = np.clip(0.35 + 0.15 * rng.normal(size=10), 0, 1)[labels]
    sets = [some[:200] for some in np.array_split(losses.argsort(), SETS)]
    gaps = np.array([wrong[one].mean() for one in sets])
    noise = 0.003 * rng.normal(size=(SEEDS, SETS))
    return rising([losses[one].mean() for one in sets], gaps + noise)


def _of_these_trainings(rng: Rng) -> Verdict:
    """Draw gaps that depend on what the ledgers of the same trainings rank by.

    Each training has losses of its own, and its gaps rise with them. In any other
    training, gap and ranking are independent.
    """
    losses = rng.normal(size=(SEEDS, 4_000))
    order = losses.mean(0).argsort()
    gaps = (0.3 + 0.15 * losses)[:, order].reshape(SEEDS, SETS, -1).mean(2)
    ranked = losses.mean(0)[order].reshape(SETS, -1).mean(1)
    return rising(ranked, gaps + 0.01 * rng.normal(size=(SEEDS, SETS)))


def _alike_neighbours(rng: Rng) -> Verdict:
    """Draw sets of which neighbours in the ranking resemble each other."""
    places = np.arange(SETS)
    alike = 0.8 ** np.abs(places[:, None] - places)
    of_sets = rng.multivariate_normal(np.zeros(SETS), alike)
    return rising(places, of_sets + 0.1 * rng.normal(size=(SEEDS, SETS)))


_RISES = "rises with difficulty (1 right)"
_PARTS = "all of 12 parts rise (composite claims)"

SCENARIOS = [
    *simulated_runs.SCENARIOS,
    *simulated_speeds.SCENARIOS,
    Scenario(_RISES, "random order", False, lambda r: _barriers(r, 0.0)),
    Scenario(
        _RISES, "two kinds of trainings, 3 trainings", False, lambda r: _two_kinds(r, 3)
    ),
    Scenario(
        _RISES,
        "two kinds of trainings, 10 trainings",
        False,
        lambda r: _two_kinds(r, 10),
    ),
    Scenario(
        _RISES,
        "two kinds of trainings, 5 trainings",
        False,
        lambda r: _two_kinds(r, 5),
        fools=True,
    ),
    Scenario(
        _RISES,
        "a trend that comes from ten classes, for other classes",
        False,
        _of_classes,
        fools=True,
    ),
    Scenario(
        _RISES,
        "neighbours in the ranking alike, no trend",
        False,
        _alike_neighbours,
        fools=True,
    ),
    Scenario(
        _RISES,
        "rises only in the trainings that rank the examples",
        False,
        _of_these_trainings,
        fools=True,
    ),
    Scenario(_RISES, "rises", True, lambda r: _barriers(r, 1.2)),
    Scenario(_RISES, "correlation 0.1", True, lambda r: _correlated(r, 0.1)),
    Scenario(_RISES, "correlation 0.3", True, lambda r: _correlated(r, 0.3)),
    Scenario(_PARTS, "correlation 0.1 in each", True, lambda r: _many_parts(r, 0.1)),
    Scenario(_PARTS, "correlation 0.9 in each", True, lambda r: _many_parts(r, 0.9)),
    *simulated_values.SCENARIOS,
]
