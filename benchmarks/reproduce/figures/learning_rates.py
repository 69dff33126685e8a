"""Beyond the paper: does the order of difficulty depend on the learning rate?

Claim: at every learning rate of fine-tuning, harder sets are farther and slower.

Data: the scale's main data set; forget sets along the range of the mean privacy loss
over the seeds' ledgers. Seeds: ``num_seeds`` trainings; each set is unlearned once per
seed and rate. Its oracles are trained once and serve all seeds. Settings: the scale's
rates, beside the rate that the search found for the other figures; this rate is in the
result. Statistics: those of ``judging.order``; a rate that closes the gap by damaging
the model is not judged.
"""

from typing import Any

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.drawing import draw_panels, table_of
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.order import judge_panels
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import FineTuned, Search, Unit
from benchmarks.reproduce.workspace import Workspace


def _runs(experiment: Experiment, rate: float) -> list[list[FineTuned]]:
    """Return the jobs at one rate, ``[seed][set]``."""
    return [
        [FineTuned(experiment, one, rate, seed) for one in sets_of(experiment)]
        for seed in range(experiment.num_seeds)
    ]


def _units(scale: Scale) -> list[Unit]:
    runs = (_runs(scale.sgd, rate) for rate in scale.rates)
    found: list[Unit] = [unit for rows in runs for row in rows for unit in row]
    return [*found, Search(scale.sgd, "fine-tune")]


def _result(scale: Scale, workspace: Workspace) -> Result:
    experiment = scale.sgd
    return {
        "searched": Search(experiment, "fine-tune").run(workspace)["settings"],
        "panels": {
            f"learning rate {rate:g}": _at(workspace, experiment, rate)
            for rate in scale.rates
        },
    }


def _at(workspace: Workspace, experiment: Experiment, rate: float) -> dict[str, Any]:
    """Return the panel of one rate."""
    sets = sets_of(experiment)
    rows = [[unit.run(workspace) for unit in row] for row in _runs(experiment, rate)]
    judges = outcomes.oracles_of(workspace, experiment, sets)
    return {
        "mean_losses": outcomes.mean_losses(workspace, experiment, sets).tolist(),
        **outcomes.panel_of_rows(rows, judges),
        "max_time": experiment.unlearn_epochs,
    }


def _table(result: Result) -> str:
    """Return a Markdown table of the rates, and the rate of the search."""
    rate = result["searched"]["learning_rate"]
    return table_of(result["panels"]) + f"\nThe search chose the rate {rate:.3g}.\n"


FIGURES = [
    Figure(
        "rates",
        "Beyond the paper: harder sets are farther and slower at every learning rate "
        "of fine-tuning.",
        _units,
        _result,
        lambda result: judge_panels(result["panels"]),
        lambda result: draw_panels(result["panels"]),
        _table,
    )
]
