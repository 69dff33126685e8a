"""Arrays from finished jobs: runs by forget sets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.units import Unlearning, oracles
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import time_to_unlearn
from opacus_pi.evaluation.trace import UnlearningTrace

UA, MIA = "unlearning_accuracy", "membership_inference"
METRICS = {"UA": UA, "MIA": MIA}  # by which every time to unlearn is taken
Sets = Sequence[ForgetSet]


def unlearnings(experiment: Experiment, sets: Sets, method: str) -> list[Unlearning]:
    """The runs of every seed on every set."""
    return [
        Unlearning(experiment, one, method, seed)
        for seed in range(experiment.num_seeds)
        for one in sets
    ]


def runs(
    workspace: Workspace, experiment: Experiment, sets: Sets, method: str
) -> list[list[dict[str, Any]]]:
    """Results of the runs, ``[seed][set]``."""
    found = [unit.run(workspace) for unit in unlearnings(experiment, sets, method)]
    return [found[i : i + len(sets)] for i in range(0, len(found), len(sets))]


def oracle_values(
    workspace: Workspace, experiment: Experiment, forget_set: ForgetSet
) -> dict[str, list[float]]:
    """The metrics of a set's oracles."""
    found = [one.run(workspace) for one in oracles(experiment, forget_set)]
    return {name: [one[name] for one in found] for name in found[0]}


def times(
    workspace: Workspace,
    experiment: Experiment,
    sets: Sets,
    method: str,
    metric: str = UA,
) -> np.ndarray:
    """Epochs until within five points of the mean oracle, ``(seeds, sets)``."""
    judges = [oracle_values(workspace, experiment, one) for one in sets]
    return times_of(runs(workspace, experiment, sets, method), judges, metric)


def times_of(
    rows: list[list[dict[str, Any]]], judges: list[dict[str, list[float]]], metric: str
) -> np.ndarray:
    """The same of results ``[seed][set]`` and the metrics of each set's oracles."""

    def time(run: dict[str, Any], oracle: dict[str, list[float]]) -> float:
        trace = UnlearningTrace(run["times"], run["trace"])
        return time_to_unlearn(trace, oracle, metric=metric)

    return np.array([list(map(time, row, judges)) for row in rows])


def gaps(
    workspace: Workspace,
    experiment: Experiment,
    sets: Sets,
    method: str,
    metric: str = UA,
) -> np.ndarray:
    """How far from the mean oracle every run ends, ``(seeds, sets)``."""
    judges = [
        np.mean(oracle_values(workspace, experiment, one)[metric]) for one in sets
    ]
    ends = [
        [run["trace"][metric][-1] for run in row]
        for row in runs(workspace, experiment, sets, method)
    ]
    return np.abs(np.array(ends) - judges)


def mean_losses(workspace: Workspace, experiment: Experiment, sets: Sets) -> np.ndarray:
    """Mean privacy loss of each set, ``(sets,)``."""
    scores = workspace.scores(experiment)["privacy loss"]
    return np.array([scores[one.indices(workspace, experiment)].mean() for one in sets])


def to_json(values: np.ndarray) -> list:
    """An array as JSON; what is not finite becomes None."""
    return [
        to_json(row) if row.ndim else (float(row) if np.isfinite(row) else None)
        for row in np.asarray(values, dtype=np.float64)
    ]


def from_json(values: list) -> np.ndarray:
    """What ``to_json`` made of times: None is never, inf."""
    numbers = np.array(values, dtype=np.float64)
    return np.where(np.isnan(numbers), np.inf, numbers)


def rounded_to_json(values: np.ndarray, digits: int = 4) -> list[float]:
    """An array as JSON with so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]
