"""Arrays from the stored results of jobs: a row per seed, a column per forget set."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.units import Unlearning, oracles
from benchmarks.reproduce.unlearning_runs import RETAINED_MIA
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import UnlearningTrace, gap_path, time_to_unlearn

UA, MIA = "unlearning_accuracy", "membership_inference"
UTILITY = "test_accuracy"
DRAWN = 1_000  # examples whose scores a result stores
METRICS = {"UA": UA, "MIA": MIA}  # each gives a time to unlearn
# the same metrics on retained images, and their sign
ON_RETAINED = {"UA": ("retain_accuracy", -1), "MIA": (RETAINED_MIA, 1)}
Sets = Sequence[ForgetSet]


def unlearnings(experiment: Experiment, sets: Sets, method: str) -> list[Unlearning]:
    """Return the runs of every seed on every set, seed by seed."""
    return [
        Unlearning(experiment, one, method, seed)
        for seed in range(experiment.num_seeds)
        for one in sets
    ]


def runs(
    workspace: Workspace, experiment: Experiment, sets: Sets, method: str
) -> list[list[dict[str, Any]]]:
    """Return the results of the runs, ``[seed][set]``."""
    found = [unit.run(workspace) for unit in unlearnings(experiment, sets, method)]
    return [found[i : i + len(sets)] for i in range(0, len(found), len(sets))]


def oracle_values(
    workspace: Workspace, experiment: Experiment, forget_set: ForgetSet
) -> dict[str, list[float]]:
    """Return the metrics of a set's oracles, one value per oracle."""
    found = [one.run(workspace) for one in oracles(experiment, forget_set)]
    return {name: [one[name] for one in found] for name in found[0]}


def times_of(
    rows: list[list[dict[str, Any]]],
    of_oracles: list[dict[str, list[float]]],
    metric: str,
) -> np.ndarray:
    """Return epochs to unlearn from given results.

    Args:
        rows: Results of the runs, ``[seed][set]``.
        of_oracles: Metrics of each set's oracles.
        metric: The metric that is compared.
    """

    def time(run: dict[str, Any], oracle: dict[str, list[float]]) -> float:
        trace = UnlearningTrace(run["times"], run["trace"])
        return time_to_unlearn(trace, oracle, metric=metric)

    return np.array([list(map(time, row, of_oracles)) for row in rows])


def gap_paths(
    rows: list[list[dict[str, Any]]],
    of_oracles: list[dict[str, list[float]]],
    metric: str,
) -> np.ndarray:
    """Return metric minus the mean oracle's at every evaluation, from given results.

    Args:
        rows: Results of the runs, ``[seed][set]``.
        of_oracles: Metrics of each set's oracles.
        metric: The metric that is compared.

    Returns:
        ``(seeds, sets, epochs + 1)``.
    """

    def path(run: dict[str, Any], oracle: dict[str, list[float]]) -> np.ndarray:
        return gap_path(
            UnlearningTrace(run["times"], run["trace"]), oracle, metric=metric
        )

    return np.array([list(map(path, row, of_oracles)) for row in rows])


def deviations(of_oracles: list[dict[str, list[float]]], metric: str) -> np.ndarray:
    """Return the metric of each oracle minus the mean oracle's, ``(oracles, sets)``."""
    found = np.array([one[metric] for one in of_oracles], dtype=np.float64).T
    return found - found.mean(0)


def panel_of(
    workspace: Workspace, experiment: Experiment, method: str, sets: Sets
) -> dict[str, Any]:
    """Return the numbers of one panel: all that the judges of an order need."""
    rows = runs(workspace, experiment, sets, method)
    return {
        "mean_losses": mean_losses(workspace, experiment, sets).tolist(),
        **panel_of_rows(rows, oracles_of(workspace, experiment, sets)),
        "max_time": experiment.unlearn_epochs,
    }


def panel_of_rows(
    rows: list[list[dict[str, Any]]], of_oracles: list[dict[str, list[float]]]
) -> dict[str, Any]:
    """Return first crossings, paths of the gaps, and what the judges need beside them.

    Args:
        rows: Results of the runs, ``[seed][set]``.
        of_oracles: Metrics of each set's oracles.
    """
    times = {m: times_of(rows, of_oracles, metric) for m, metric in METRICS.items()}
    paths = {m: gap_paths(rows, of_oracles, metric) for m, metric in METRICS.items()}
    each = {m: deviations(of_oracles, metric) for m, metric in METRICS.items()}
    lost = -gap_paths(rows, of_oracles, UTILITY)[:, :, -1]
    return {
        "times": {name: to_json(one) for name, one in times.items()},
        "gaps": {name: np.round(one, 5).tolist() for name, one in paths.items()},
        "oracles": {name: np.round(one, 5).tolist() for name, one in each.items()},
        "moved": {name: moved(rows, name).tolist() for name in METRICS},
        "lost": np.round(lost, 5).tolist(),
    }


def moved(rows: list[list[dict[str, Any]]], name: str) -> np.ndarray:
    """Return a metric on retained images minus that before unlearning.

    Args:
        rows: Results of the runs, ``[seed][set]``.
        name: A name of ``METRICS``.

    Returns:
        ``(seeds, sets, epochs + 1)``; above 0 if retained images look more forgotten.
    """
    metric, sign = ON_RETAINED[name]
    found = np.array([[run["trace"][metric] for run in row] for row in rows])
    return np.asarray(sign * np.round(found - found[:, :, :1], 5))


def oracles_of(
    workspace: Workspace, experiment: Experiment, sets: Sets
) -> list[dict[str, list[float]]]:
    """Return the metrics of the oracles of each set."""
    return [oracle_values(workspace, experiment, one) for one in sets]


def mean_losses(workspace: Workspace, experiment: Experiment, sets: Sets) -> np.ndarray:
    """Return the mean privacy loss of each set, ``(sets,)``."""
    return np.array([one.mean_loss(workspace, experiment) for one in sets])


def to_json(values: np.ndarray) -> list:
    """Return an array as JSON; values that are not finite become None."""
    return [
        to_json(row) if row.ndim else (float(row) if np.isfinite(row) else None)
        for row in np.asarray(values, dtype=np.float64)
    ]


def from_json(values: list) -> np.ndarray:
    """Return the times that ``to_json`` stored; None becomes ``inf``, never."""
    numbers = np.array(values, dtype=np.float64)
    return np.where(np.isnan(numbers), np.inf, numbers)


def drawn_examples(number: int) -> np.ndarray:
    """Return the indices of the examples whose scores a result stores, at random."""
    return np.random.default_rng(0).permutation(number)[:DRAWN]


def rounded_to_json(values: np.ndarray, digits: int = 4) -> list[float]:
    """Return an array as JSON, with this many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]
