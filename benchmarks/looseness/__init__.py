"""How loose are the bounds? Cases whose exact divergence is known, and their table.

``case`` says what a case is. ``single_steps``, ``gaussians``, ``chains``, ``ridge``,
``groups``, ``constants`` and ``counterexamples`` generate random cases. ``__main__``
runs all of them and makes the table, and ``steps`` a second one: steps to unlearn.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.looseness.case import Case
from benchmarks.looseness.chains import adaptive_chains, double_wells
from benchmarks.looseness.constants import conversions, two_point_laws
from benchmarks.looseness.counterexamples import rare_events, threshold_orders
from benchmarks.looseness.gaussians import (
    constant_gradients,
    quadratic_unlearning,
    shifted_schedules,
)
from benchmarks.looseness.groups import group_steps
from benchmarks.looseness.ridge import last_iterates, whole_runs
from benchmarks.looseness.single_steps import (
    mixtures,
    subsampled_step,
    two_adaptive_steps,
)

FAMILIES = {  # generator, and number of its cases in the table
    "subsampled_step": (subsampled_step, 60),
    "two_adaptive_steps": (two_adaptive_steps, 30),
    "constant_gradients": (constant_gradients, 40),
    "adaptive_chains": (adaptive_chains, 12),
    "mixtures": (mixtures, 60),
    "quadratic_unlearning": (quadratic_unlearning, 60),
    "shifted_schedules": (shifted_schedules, 100),
    "double_wells": (double_wells, 20),
    "group_steps": (group_steps, 40),
    "ridge_whole_runs": (whole_runs, 20),
    "ridge_last_iterates": (last_iterates, 30),
    "rare_events": (rare_events, 15),
    "threshold_orders": (threshold_orders, 4),
    "conversions": (conversions, 40),
    "two_point_laws": (two_point_laws, 40),
}


def cases(name: str, number: int, seed: int = 0) -> Iterator[Case]:
    """Generate random cases.

    Args:
        name: A key of ``FAMILIES``.
        number: Number of random settings; some generators yield several cases each.
        seed: Of the random settings.
    """
    return FAMILIES[name][0](np.random.default_rng(seed), number)
