"""Figure 1, left and middle: time to unlearn against the privacy loss.

Claim, left: with SGLD in training and in unlearning, forget sets of higher privacy loss
take longer to unlearn, at every noise level. Claim, middle: the same holds for SGD and
fine-tuning, by UA, by MIA and by the Gaussian unlearning score.

Data: the scale's main data set; five strata by mean privacy loss over the seeds'
ledgers (Appendix D). Seeds: ``num_seeds`` trainings; each stratum is unlearned once per
seed. The oracles of a stratum are trained once and serve all seeds. The Gaussian score
needs one more training per stratum and seed, on noisy inputs. Settings: the left panel
uses those of training, including the noise on the mean gradient; the learning rate of
the middle panel is searched on a random set. Time: the first epoch within five points
of the mean oracle.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.verdicts import (
    Verdict,
    combined,
    medians_text,
    ordering,
)
from benchmarks.reproduce.forget_sets import strata
from benchmarks.reproduce.poison_units import GUS, Poisoned
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import time_to_unlearn
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.plotting import plot_time_to_unlearn


def panel(
    workspace: Workspace, experiment: Experiment, method: str, sets: outcomes.Sets
) -> Result:
    """Return the numbers of one panel: times by UA and MIA, and mean losses."""
    times = {
        name: outcomes.to_json(
            outcomes.times(workspace, experiment, sets, method, metric)
        )
        for name, metric in outcomes.METRICS.items()
    }
    losses = outcomes.mean_losses(workspace, experiment, sets)
    return {
        "mean_losses": losses.tolist(),
        "times": times,
        "max_time": experiment.unlearn_epochs,
    }


def judge_panel(found: Result) -> Verdict:
    """Decide whether harder strata take longer, by every metric."""
    times = {name: outcomes.from_json(t) for name, t in found["times"].items()}
    return combined({name: judge_times(one) for name, one in times.items()})


def judge_panels(panels: dict[str, Result]) -> Verdict:
    """Decide whether harder strata take longer in every panel."""
    return combined({name: judge_panel(one) for name, one in panels.items()})


def judge_times(times: np.ndarray) -> Verdict:
    """Decide whether harder strata take longer; quote the median times.

    Args:
        times: ``(seeds, sets)``, easiest set first.
    """
    order = ordering(times)
    return Verdict(
        order.verdict, f"{order.because}; median epochs {medians_text(times)}"
    )


def draw_panel(ax: Axes, title: str, found: Result) -> None:
    """Draw the time of every run against the mean privacy loss of its forget set."""
    times = {name: outcomes.from_json(t) for name, t in found["times"].items()}
    runs = len(next(iter(times.values())))
    losses = np.tile(found["mean_losses"], (runs, 1))
    plot_time_to_unlearn(losses, times, max_time=found["max_time"], ax=ax)
    ax.set_title(title, fontsize="medium")


def draw_panels(panels: dict[str, Result]) -> Picture:
    """Draw panels in rows of at most four."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    picture, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.2 * columns, 3.6 * lines),
        squeeze=False,
        layout="constrained",
    )
    for ax, (title, found) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(ax, title, found)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    return picture


def _left_units(scale: Scale) -> list[Unit]:
    return [
        unit
        for experiment in scale.sgld
        for unit in outcomes.unlearnings(experiment, strata(experiment), "SGLD")
    ]


def _left(scale: Scale, workspace: Workspace) -> Result:
    return {
        "panels": {
            f"SGLD, σ = {experiment.recipe.noise_std:g}": panel(
                workspace, experiment, "SGLD", strata(experiment)
            )
            for experiment in scale.sgld
        }
    }


def _middle_units(scale: Scale) -> list[Unit]:
    experiment = scale.sgd
    return [
        *outcomes.unlearnings(experiment, strata(experiment), "fine-tune"),
        *_poisoned(scale),
    ]


def _poisoned(scale: Scale) -> list[Poisoned]:
    """Return the jobs with noisy inputs, seed by seed."""
    return [
        Poisoned(scale.sgd, one, "fine-tune", seed, scale.poison_std)
        for seed in range(scale.sgd.num_seeds)
        for one in strata(scale.sgd)
    ]


def _middle(scale: Scale, workspace: Workspace) -> Result:
    found = panel(workspace, scale.sgd, "fine-tune", strata(scale.sgd))
    runs = [unit.run(workspace) for unit in _poisoned(scale)]
    times = [
        time_to_unlearn(
            UnlearningTrace(run["times"], run["trace"]), run["oracle"], metric=GUS
        )
        for run in runs
    ]
    shaped = np.reshape(times, (scale.sgd.num_seeds, -1))
    found["times"]["GUS"] = outcomes.to_json(shaped)
    found["gus"] = {
        "before": [run["trace"][GUS][0] for run in runs],
        "after": [run["trace"][GUS][-1] for run in runs],
        "oracle": [run["oracle"][GUS] for run in runs],
    }
    return found


FIGURES = [
    Figure(
        "fig1-left",
        "SGLD: forget sets of higher privacy loss take longer to unlearn, at every "
        "noise level.",
        _left_units,
        _left,
        lambda result: judge_panels(result["panels"]),
        lambda result: draw_panels(result["panels"]),
    ),
    Figure(
        "fig1-middle",
        "SGD and fine-tuning: forget sets of higher privacy loss take longer to "
        "unlearn, by UA, MIA and GUS.",
        _middle_units,
        _middle,
        judge_panel,
        lambda result: draw_panels({"SGD, fine-tuning": result}),
    ),
]
