"""Beyond the paper: does the order of difficulty depend on the learning rate?

Claim: at every learning rate of fine-tuning, harder sets take longer.

Data: the scale's main data set; five strata by mean privacy loss over the seeds'
ledgers. Seeds: ``num_seeds`` trainings; each stratum is unlearned once per seed and
rate. Its oracles are trained once and serve all seeds. Settings: the scale's rates,
around the rate that the search on a random set finds for the other figures; this rate
is in the result. Time: the first epoch within five points of the mean oracle. A rate
that reaches the oracle by damaging the model is recognised by its test accuracy.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.times_to_unlearn import draw_panels, judge_panels
from benchmarks.reproduce.figures.verdicts import (
    Verdict,
    epochs_text,
    interval_text,
)
from benchmarks.reproduce.forget_sets import strata
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import FineTuned, Search, Unit
from benchmarks.reproduce.workspace import Workspace

_ENDS = {
    "UA after": (outcomes.UA, -1),
    "TA before": ("test_accuracy", 0),
    "TA after": ("test_accuracy", -1),
}


def _runs(experiment: Experiment, rate: float) -> list[list[FineTuned]]:
    """Return the jobs at one rate, ``[seed][set]``."""
    return [
        [FineTuned(experiment, one, rate, seed) for one in strata(experiment)]
        for seed in range(experiment.num_seeds)
    ]


def _units(scale: Scale) -> list[Unit]:
    runs = (_runs(scale.sgd, rate) for rate in scale.rates)
    found: list[Unit] = [unit for rows in runs for row in rows for unit in row]
    return [*found, Search(scale.sgd, "fine-tune")]


def _result(scale: Scale, workspace: Workspace) -> Result:
    experiment, sets = scale.sgd, strata(scale.sgd)
    return {
        "searched": Search(experiment, "fine-tune").run(workspace)["settings"],
        "mean_losses": outcomes.mean_losses(workspace, experiment, sets).tolist(),
        "max_time": experiment.unlearn_epochs,
        "oracle": [
            outcomes.oracle_values(workspace, experiment, one)[outcomes.UA]
            for one in sets
        ],
        "rates": {
            f"{rate:g}": _at(workspace, experiment, rate) for rate in scale.rates
        },
    }


def _at(workspace: Workspace, experiment: Experiment, rate: float) -> dict[str, Any]:
    """Return times by every metric, and UA and test accuracy, ``[seed][set]``."""
    rows = [[unit.run(workspace) for unit in row] for row in _runs(experiment, rate)]
    judges = [
        outcomes.oracle_values(workspace, experiment, one) for one in strata(experiment)
    ]
    return {
        "times": {
            name: outcomes.to_json(outcomes.times_of(rows, judges, metric))
            for name, metric in outcomes.METRICS.items()
        },
        **{
            name: [[run["trace"][metric][when] for run in row] for row in rows]
            for name, (metric, when) in _ENDS.items()
        },
    }


def _judge(result: Result) -> Verdict:
    return judge_panels({f"rate {rate}": one for rate, one in result["rates"].items()})


def _draw(result: Result) -> Picture:
    return draw_panels(
        {f"learning rate {rate}": result | one for rate, one in result["rates"].items()}
    )


def _table(result: Result) -> str:
    """Return a Markdown table: a line per rate for the hardest set, with intervals."""
    oracle, most = np.mean(result["oracle"][-1]), result["max_time"]
    lines = [
        "| learning rate | hardest set: epochs by UA | UA after (oracles "
        f"{oracle:.3f}) | test accuracy before → after |",
        "|---|---|---|---|",
    ]
    for rate, one in result["rates"].items():
        hardest = {name: np.array(one[name])[:, -1] for name in _ENDS}
        cells = [
            rate,
            epochs_text(outcomes.from_json(one["times"]["UA"])[:, -1], most),
            interval_text(hardest["UA after"]),
            " → ".join(
                interval_text(hardest[f"TA {when}"]) for when in ("before", "after")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    searched = result["searched"]["learning_rate"]
    return (
        "\n".join(lines)
        + f"\n\nThe search on a random set found the rate {searched:.3g}.\n"
    )


FIGURES = [
    Figure(
        "rates",
        "Beyond the paper: harder sets take longer at every learning rate of "
        "fine-tuning.",
        _units,
        _result,
        _judge,
        _draw,
        _table,
    )
]
