"""Figure 1, left and middle: time to unlearn against the privacy loss.

Claim, left: with SGLD in training and in unlearning, forget sets of higher privacy loss
take longer to unlearn, at every noise level. Claim, middle: the same holds for SGD and
fine-tuning, by UA, by MIA and by the Gaussian unlearning score.

Data: the scale's main data set; forget sets along the whole range of the mean privacy
loss over the seeds' ledgers, without common examples. Seeds: ``num_seeds`` trainings;
each set is unlearned once per seed. The oracles of a set are trained once and serve all
seeds, so the set is the unit of every test. The Gaussian score needs one more training
per set and seed, on noisy inputs, and can be left out. Settings: the left panel uses
those of training, including the noise on the mean gradient; the learning rate of the
middle panel is searched on a set of its own. Primary statistic, fixed before any run:
the area under the gap to the mean oracle, see ``judging.order``. The first epoch within
five points, the paper's time, is stored beside it.
"""

import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.drawing import draw_panels
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.order import (
    Runs,
    judge_order,
    judge_panel,
    judge_panels,
)
from benchmarks.reproduce.judging.verdicts import Verdict, combined
from benchmarks.reproduce.poison_units import GUS, Poisoned
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace


def _left_units(scale: Scale) -> list[Unit]:
    return [
        unit
        for experiment in scale.sgld
        for unit in outcomes.unlearnings(experiment, sets_of(experiment), "SGLD")
    ]


def _left(scale: Scale, workspace: Workspace) -> Result:
    return {
        "panels": {
            f"SGLD, σ = {experiment.recipe.noise_std:g}": outcomes.panel_of(
                workspace, experiment, "SGLD", sets_of(experiment)
            )
            for experiment in scale.sgld
        }
    }


def _middle_units(scale: Scale) -> list[Unit]:
    experiment = scale.sgd
    return [
        *outcomes.unlearnings(experiment, sets_of(experiment), "fine-tune"),
        *_poisoned(scale),
    ]


def _poisoned(scale: Scale) -> list[Poisoned]:
    """Return the jobs with noisy inputs, seed by seed; none without the score."""
    if not scale.poison_std:
        return []
    return [
        Poisoned(scale.sgd, one, "fine-tune", seed, scale.poison_std)
        for seed in range(scale.sgd.num_seeds)
        for one in sets_of(scale.sgd)
    ]


def _middle(scale: Scale, workspace: Workspace) -> Result:
    found = outcomes.panel_of(workspace, scale.sgd, "fine-tune", sets_of(scale.sgd))
    runs = [unit.run(workspace) for unit in _poisoned(scale)]
    if not runs:
        return found
    count = scale.sgd.num_sets
    scores = [
        np.subtract(one["trace"][GUS], np.mean(one["oracle"][GUS])) for one in runs
    ]
    spread = [np.std(one["oracle"][GUS], ddof=1) for one in runs]
    return found | {
        "gus": {
            "gaps": np.reshape(scores, (-1, count, len(scores[0]))).tolist(),
            "spread": np.reshape(spread, (-1, count)).mean(0).tolist(),
        }
    }


def _judge_middle(result: Result) -> Verdict:
    """Judge UA and MIA, and the Gaussian score if it was measured.

    The score has no natural scale, so a set has something to forget if its gap exceeds
    twice the standard deviation of its oracles.
    """
    found = judge_panel(result)
    if "gus" not in result:
        return found
    gus = Runs(
        np.array(result["mean_losses"]),
        np.array(result["gus"]["gaps"]),
        np.array(result["lost"]),
        2 * np.array(result["gus"]["spread"]),
    )
    return combined(found.parts | {"GUS": judge_order(gus)})


def _draw_middle(result: Result) -> Picture:
    return draw_panels({"SGD, fine-tuning": result})


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
        _judge_middle,
        _draw_middle,
    ),
]
