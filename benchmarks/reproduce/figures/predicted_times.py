"""Beyond the paper: does the privacy loss of a set predict how long it must run?

Claim: at equal cost, budgets from the privacy loss leave less of the gap than one
budget for all sets.

Data, model, seeds, forget sets and settings are those of figure 1 (middle), for three
methods that train on the retained images. Described, but not judged, because no test
with 20 sets has any power (see ``judging.budgets``): for each set that has something to
forget, the gap by UA that a fixed budget leaves, minus the gap that its own budget
leaves; the mean over sets, with Student's interval over sets.
A set's own budget is proportional to the time that ``Unlearner.plan``'s fit predicts
from the *other* sets (the first epoch within five points; a run that never got there
counts as its length). All budgets are scaled so that both policies cost the same number
of epochs in total, half of those that were run. So no set helps to predict itself.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.budgets import judge_gain, predicted_times
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import combined
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace

METHODS = ("fine-tune", "Langevin", "L1-sparse")
_METRIC = "UA"


def _units(scale: Scale) -> list[Unit]:
    sets = sets_of(scale.sgd)
    return [u for name in METHODS for u in outcomes.unlearnings(scale.sgd, sets, name)]


def _result(scale: Scale, workspace: Workspace) -> Result:
    experiment, sets = scale.sgd, sets_of(scale.sgd)
    return {
        "panels": {
            name: outcomes.panel_of(workspace, experiment, name, sets)
            for name in METHODS
        }
    }


def _draw(result: Result) -> Picture:
    panels = result["panels"]
    picture, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained"
    )
    for ax, (method, panel) in zip(axes, panels.items(), strict=True):
        most = panel["max_time"]
        times = outcomes.from_json(panel["times"][_METRIC])
        losses = np.array(panel["mean_losses"])
        taken = np.minimum(times, most).mean(0)
        ax.scatter(predicted_times(losses, times, most), taken, zorder=2)
        ax.plot([0, most], [0, most], color="grey", lw=1, zorder=1)
        ax.set_xlabel("epochs predicted from the other sets")
        ax.set_title(method, fontsize="medium")
    axes[0].set_ylabel(f"epochs taken, mean over seeds (never: {most})")
    return picture


FIGURES = [
    Figure(
        "predicted",
        "Beyond the paper: the privacy loss predicts how long unlearning takes: at "
        "equal cost, budgets from it leave less of the gap than one budget for all "
        "sets.",
        _units,
        _result,
        lambda result: combined(
            {
                name: judge_gain(Runs.of_panel(one, _METRIC))
                for name, one in result["panels"].items()
            }
        ),
        _draw,
    )
]
