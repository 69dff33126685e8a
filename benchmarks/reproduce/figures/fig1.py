"""Figure 1: time to unlearn, and loss barriers, against the privacy loss.

Data: the scale's data set, five strata by mean privacy loss over the seeds' ledgers.
Left: SGLD training and unlearning at several noise levels, by UA and by MIA. Middle:
SGD and fine-tuning, by UA, MIA and the Gaussian unlearning score (a training with
noisy inputs for every stratum and seed). Right: barriers between the model and an
oracle before and after fine-tuning, beside those between oracles.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.barrier_units import BarrierBaseline, BarrierBefore
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures import outcomes
from benchmarks.reproduce.figures.figure import (
    NOT_BORNE_OUT,
    Figure,
    Result,
    Verdict,
    joined,
    of_interval,
    ordering,
)
from benchmarks.reproduce.forget import strata
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.poison_units import GUS, Poisoned
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from opacus_pi.evaluation import time_to_unlearn
from opacus_pi.evaluation.intervals import mean_interval
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.plotting import plot_barriers, plot_time_to_unlearn


def panel(lab: Lab, experiment: Experiment, method: str, sets: outcomes.Sets) -> Result:
    """One panel of times by UA and MIA."""
    times = {
        name: outcomes.listed(outcomes.times(lab, experiment, sets, method, metric))
        for name, metric in outcomes.METRICS.items()
    }
    losses = outcomes.mean_losses(lab, experiment, sets)
    return {
        "mean_losses": losses.tolist(),
        "times": times,
        "max_time": experiment.unlearn_epochs,
    }


def judge_panel(found: Result) -> Verdict:
    """Whether harder strata take longer, by every metric."""
    return joined(
        {name: ordering(outcomes.array(t)) for name, t in found["times"].items()}
    )


def draw_panels(panels: dict[str, Result]) -> Picture:
    """Panels in rows of at most four."""
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
        times = {name: outcomes.array(t) for name, t in found["times"].items()}
        runs = len(next(iter(times.values())))
        losses = np.tile(found["mean_losses"], (runs, 1))
        plot_time_to_unlearn(losses, times, max_time=found["max_time"], ax=ax)
        ax.set_title(title, fontsize="medium")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    return picture


def _left_units(scale: Scale) -> list[Unit]:
    return [
        unit
        for experiment in scale.sgld
        for unit in outcomes.unlearnings(experiment, strata(experiment), "SGLD")
    ]


def _left(scale: Scale, lab: Lab) -> Result:
    return {
        "panels": {
            f"SGLD, σ = {experiment.recipe.noise_std:g}": panel(
                lab, experiment, "SGLD", strata(experiment)
            )
            for experiment in scale.sgld
        }
    }


def _judge_panels(result: Result) -> Verdict:
    return joined({name: judge_panel(p) for name, p in result["panels"].items()})


def _middle_units(scale: Scale) -> list[Unit]:
    experiment = scale.sgd
    return [
        *outcomes.unlearnings(experiment, strata(experiment), "fine-tune"),
        *_poisoned(scale),
    ]


def _poisoned(scale: Scale) -> list[Poisoned]:
    """The poisoned runs, seed by seed."""
    return [
        Poisoned(scale.sgd, one, "fine-tune", seed, scale.poison_std)
        for seed in range(scale.sgd.num_seeds)
        for one in strata(scale.sgd)
    ]


def _middle(scale: Scale, lab: Lab) -> Result:
    found = panel(lab, scale.sgd, "fine-tune", strata(scale.sgd))
    runs = [unit.run(lab) for unit in _poisoned(scale)]
    times = [
        time_to_unlearn(
            UnlearningTrace(run["times"], run["trace"]), run["oracle"], metric=GUS
        )
        for run in runs
    ]
    shaped = np.reshape(times, (scale.sgd.num_seeds, -1))
    found["times"]["GUS"] = outcomes.listed(shaped)
    found["gus"] = {
        "before": [run["trace"][GUS][0] for run in runs],
        "after": [run["trace"][GUS][-1] for run in runs],
        "oracle": [run["oracle"][GUS] for run in runs],
    }
    return found


def _right_units(scale: Scale) -> list[Unit]:
    experiment, sets = scale.sgd, strata(scale.sgd)
    seeds = range(experiment.num_seeds)
    return [
        *outcomes.unlearnings(experiment, sets, "fine-tune"),
        *(BarrierBefore(experiment, one, seed) for seed in seeds for one in sets),
        *(BarrierBaseline(experiment, one) for one in sets),
    ]


def _right(scale: Scale, lab: Lab) -> Result:
    experiment, sets = scale.sgd, strata(scale.sgd)
    seeds = range(experiment.num_seeds)
    rows = outcomes.runs(lab, experiment, sets, "fine-tune")
    return {
        "mean_losses": outcomes.mean_losses(lab, experiment, sets).tolist(),
        "before": [
            [BarrierBefore(experiment, one, seed).run(lab) for one in sets]
            for seed in seeds
        ],
        "after": [[run["barrier_after"] for run in row] for row in rows],
        "baseline": [BarrierBaseline(experiment, one).run(lab) for one in sets],
    }


def _judge_right(result: Result) -> Verdict:
    before, after = np.array(result["before"]), np.array(result["after"])
    baseline = np.array(result["baseline"])
    pairs = {
        "after - baseline, hardest set": after[:, -1] - baseline[-1].mean(),
        "before - baseline, hardest set": before[:, -1] - baseline[-1].mean(),
        "before, hardest - easiest set": before[:, -1] - before[:, 0],
    }
    found = {name: mean_interval(values) for name, values in pairs.items()}
    because = "; ".join(
        f"{name} {i.estimate:.3f} [{i.low:.3f}, {i.high:.3f}]"
        for name, i in found.items()
    )
    after_fits, _, rises = found.values()
    verdict = of_interval(rises.low, rises.high)
    if after_fits.low > baseline.std():  # beyond the spread of pairs of oracles
        verdict = NOT_BORNE_OUT
    return Verdict(verdict, because)


def _draw_right(result: Result) -> Picture:
    runs = len(result["before"])
    losses = np.tile(result["mean_losses"], (runs, 1))
    ax = plot_barriers(losses, result["before"], result["after"], result["baseline"])
    return ax.figure


FIGURES = [
    Figure(
        "fig1-left",
        "SGLD: forget sets of higher privacy loss take longer to unlearn, at every "
        "noise level.",
        _left_units,
        _left,
        _judge_panels,
        lambda result: draw_panels(result["panels"]),
    ),
    Figure(
        "fig1-middle",
        "SGD and fine-tuning: the same by UA, MIA and GUS.",
        _middle_units,
        _middle,
        judge_panel,
        lambda result: draw_panels({"SGD, fine-tuning": result}),
    ),
    Figure(
        "fig1-right",
        "The barrier to an oracle before unlearning rises with the privacy loss; "
        "after unlearning it is that between oracles.",
        _right_units,
        _right,
        _judge_right,
        _draw_right,
    ),
]
