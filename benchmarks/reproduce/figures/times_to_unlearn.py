"""Figure 1, left and middle: unlearning against the privacy loss.

Claim of the paper, left: with SGLD in training and in unlearning, forget sets of higher
privacy loss take longer to unlearn, at every noise level. Claim, middle: the same holds
for SGD and fine-tuning, by UA, by MIA and by the Gaussian unlearning score. A set can
take longer because it starts farther from its oracles, or because it is slower: these
are judged as two claims.

Data: the scale's main data set; forget sets along the whole range of the mean privacy
loss over the seeds' ledgers, without common examples. Seeds: ``num_seeds`` trainings;
each set is unlearned once per seed. The oracles of a set are trained once and serve all
seeds, so the set is the unit of every test. The Gaussian score needs one more training
per set and seed, on noisy inputs, and can be left out. Settings: the left panel uses
those of training, including the noise on the mean gradient; the learning rate of the
middle panel is searched on a set of its own. Primary statistics:
those of ``judging.order``. The first epoch within five points, the paper's time, is
stored beside them.
"""

import numpy as np

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.drawing import draw_panels, table_of
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.order import (
    by_claim,
    judge_order,
    judge_panels,
    orders_of,
)
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import Verdict, with_remark
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
    shape = -1, scale.sgd.num_sets
    paths = np.array([one["trace"][GUS] for one in runs])
    oracles = np.array([one["oracle"][GUS] for one in runs])
    mean = oracles.mean(1, keepdims=True)
    return found | {
        "gus": {
            "gaps": (paths - mean).reshape(*shape, paths.shape[1]).tolist(),
            "oracles": [one.reshape(shape).tolist() for one in (oracles - mean).T],
            "spread": oracles.std(1, ddof=1).reshape(shape).mean(0).tolist(),
        }
    }


def _judge_middle(result: Result) -> Verdict:
    """Judge UA and MIA, and the Gaussian score if it was measured.

    Unlearning lowers the score. It has no natural scale, so a set has something to
    forget if its gap exceeds twice the standard deviation of its oracles. It is a score
    of the noise on the forget set, which has no counterpart on retained images.
    """
    found = orders_of(result)
    if "gus" not in result:
        return with_remark(
            by_claim(found), "GUS", "the Gaussian unlearning score was not measured"
        )
    gus = Runs(
        np.array(result["mean_losses"], dtype=np.float64),
        np.array(result["gus"]["gaps"], dtype=np.float64),
        np.array(result["lost"], dtype=np.float64),
        np.array(result["gus"]["oracles"], dtype=np.float64),
        np.zeros(np.shape(result["gus"]["gaps"])),
        toward=-1,
        least_gap=2 * np.array(result["gus"]["spread"], dtype=np.float64),
    )
    return by_claim(found | {"GUS": judge_order(gus)})


def _panels_of_middle(result: Result) -> dict[str, Result]:
    return {"SGD, fine-tuning": result}


FIGURES = [
    Figure(
        "fig1-left",
        "SGLD: forget sets of higher privacy loss are farther from their oracles, and "
        "slower to unlearn, at every noise level.",
        _left_units,
        _left,
        lambda result: judge_panels(result["panels"]),
        lambda result: draw_panels(result["panels"]),
        lambda result: table_of(result["panels"]),
    ),
    Figure(
        "fig1-middle",
        "SGD and fine-tuning: forget sets of higher privacy loss are farther from "
        "their oracles, and slower to unlearn, by UA and MIA (and by GUS where it was "
        "measured).",
        _middle_units,
        _middle,
        _judge_middle,
        lambda result: draw_panels(_panels_of_middle(result)),
        lambda result: table_of(_panels_of_middle(result)),
    ),
]
