"""Every simulated study: of unlearning runs, and of other values.

In all scenarios about forgetting, sets differ at random, in a way that all seeds share,
as they share examples and oracles; seeds vary within sets.
"""

import numpy as np

from benchmarks.reproduce.judging import simulated_runs, simulated_values
from benchmarks.reproduce.judging.order import rising
from benchmarks.reproduce.judging.scenario import Rng, Scenario
from benchmarks.reproduce.judging.simulated_runs import SEEDS, SETS
from benchmarks.reproduce.judging.verdicts import Verdict


def _barriers(rng: Rng, slope: float) -> Verdict:
    hardness = np.linspace(-0.5, 0.5, SETS)
    of_sets = slope * hardness + 0.3 * rng.normal(size=SETS)
    return rising(hardness, of_sets + 0.2 * rng.normal(size=(SEEDS, SETS)))


_RISES = "rises with difficulty (1 right)"

SCENARIOS = [
    *simulated_runs.SCENARIOS,
    Scenario(_RISES, "random order", False, lambda r: _barriers(r, 0.0)),
    Scenario(_RISES, "rises", True, lambda r: _barriers(r, 1.2)),
    *simulated_values.SCENARIOS,
]
