"""Time to unlearn in other settings: figures 5 to 8.

Claims. Figure 5: during fine-tuning UA and MIA approach the oracle's, hard sets last,
and RA and TA end within five points of each other on all sets. Figure 6: L1-sparse
unlearning takes longer on harder sets. Figure 7: so does fine-tuning on other data sets
and models. Figure 8: so does fine-tuning for small and for large forget sets, and the
difference between hard and easy sets shrinks with their size.

Data: the scale's main data set (figure 7: its other ones); five strata by mean privacy
loss over the seeds' ledgers, of the scale's size (figure 8: of several sizes). Seeds:
``num_seeds`` trainings; each stratum is unlearned once per seed. The oracles of a
stratum are trained once and serve all seeds. Settings: the learning rate, and L1's
strength, are searched on a random set. Time: the first epoch within five points of the
mean oracle.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.times_to_unlearn import (
    draw_panels,
    judge_panel,
    judge_panels,
    panel,
)
from benchmarks.reproduce.figures.verdicts import (
    NOT_TESTABLE,
    Verdict,
    combined,
    of_interval,
    text_of,
)
from benchmarks.reproduce.forget_sets import STRATA, strata
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation.intervals import mean_interval
from opacus_pi.plotting import plot_curves

_UTILITY = {"RA": "retain_accuracy", "TA": "test_accuracy"}
_ALIKE = 0.05  # accuracies that differ by at most this much are alike


def _fine_tuning(experiment: Experiment, size: int = 0) -> list[Unit]:
    return list(outcomes.unlearnings(experiment, strata(experiment, size), "fine-tune"))


def _curves(scale: Scale, workspace: Workspace) -> Result:
    experiment, sets = scale.sgd, strata(scale.sgd)
    rows = outcomes.runs(workspace, experiment, sets, "fine-tune")
    return {
        "times": rows[0][0]["times"],
        "curves": {
            name: {
                rule: [row[k]["trace"][metric] for row in rows]
                for k, rule in enumerate(STRATA)
            }
            for name, metric in outcomes.METRICS.items()
        },
        "utility": {
            name: [[run["trace"][metric][-1] for run in row] for row in rows]
            for name, metric in _UTILITY.items()
        },
        "oracles": {
            name: {
                one.rule: outcomes.oracle_values(workspace, experiment, one)[metric]
                for one in sets
            }
            for name, metric in outcomes.METRICS.items()
        },
    }


def _judge_curves(result: Result) -> Verdict:
    """Decide, by seed, whether the hardest set comes closer and stays furthest.

    A further part asks whether retain and test accuracy end alike on all sets.
    """
    found = {}
    for name, curves in result["curves"].items():
        gaps = {
            rule: np.abs(
                np.array(curves[rule]) - np.mean(result["oracles"][name][rule])
            )
            for rule in STRATA
        }
        gap = gaps["last"]
        closer = mean_interval(gap[:, 0] - gap[:, -1])
        found[name] = Verdict(
            of_interval(closer.low, closer.high),
            f"distance of the hardest set from the oracle: {gap[:, 0].mean():.3f} "
            f"before, {gap[:, -1].mean():.3f} after; closer by {text_of(closer)}, "
            f"n = {len(gap)}",
        )
        others = np.max([gaps[rule][:, -1] for rule in STRATA if rule != "last"], 0)
        last = mean_interval(gap[:, -1] - others)
        found[f"{name}, hardest last"] = Verdict(
            of_interval(last.low, last.high),
            "final distance of the hardest set from its oracle, minus the largest of "
            f"the others: {text_of(last)}",
        )
    return combined(found | _alike(result["utility"]))


def _alike(utility: dict[str, list[list[float]]]) -> dict[str, Verdict]:
    """Decide whether accuracies, ``[seed][set]``, end within five points."""
    found = {}
    for name, ends in utility.items():
        apart = mean_interval(np.ptp(ends, axis=1))
        kind = of_interval(_ALIKE - apart.high, _ALIKE - apart.low)
        found[f"{name} alike"] = Verdict(
            kind, f"accuracies of the sets differ by {text_of(apart)}"
        )
    return found


def _draw_curves(result: Result) -> Picture:
    picture, axes = plt.subplots(
        1, len(outcomes.METRICS), figsize=(8.4, 3.6), layout="constrained"
    )
    for ax, (name, curves) in zip(axes, result["curves"].items(), strict=True):
        oracles = result["oracles"][name]
        plot_curves(result["times"], curves, oracles, metric=name, ax=ax)
    return picture


def _l1_units(scale: Scale) -> list[Unit]:
    return list(outcomes.unlearnings(scale.sgd, strata(scale.sgd), "L1-sparse"))


def _title(experiment: Experiment) -> str:
    return f"{experiment.dataset}, {experiment.recipe.model}"


def _other_units(scale: Scale) -> list[Unit]:
    return [unit for experiment in scale.others for unit in _fine_tuning(experiment)]


def _others(scale: Scale, workspace: Workspace) -> Result:
    return {
        "panels": {
            _title(one): panel(workspace, one, "fine-tune", strata(one))
            for one in scale.others
        }
    }


def _size_units(scale: Scale) -> list[Unit]:
    return [u for size in scale.set_sizes for u in _fine_tuning(scale.sgd, size)]


def _sizes(scale: Scale, workspace: Workspace) -> Result:
    return {
        "panels": {
            f"forget sets of {size:,}": panel(
                workspace, scale.sgd, "fine-tune", strata(scale.sgd, size)
            )
            for size in scale.set_sizes
        }
    }


def _judge_sizes(result: Result) -> Verdict:
    """Decide about every size, and whether the separation shrinks with the size."""
    panels = result["panels"]
    verdicts = {"order": _judge_panels(result)}
    for metric in outcomes.METRICS:
        small, *_, large = (_separation(found, metric) for found in panels.values())
        shrinks = mean_interval(small - large)
        verdicts[f"separation by {metric}"] = Verdict(
            of_interval(shrinks.low, shrinks.high),
            f"hardest minus easiest: {small.mean():.1f} epochs for the smallest sets, "
            f"{large.mean():.1f} for the largest; shrinks by {text_of(shrinks, 2)}, "
            f"n = {len(small)}",
        )
    return combined(verdicts)


def _separation(found: Result, metric: str) -> np.ndarray:
    """Return the hardest set's epochs minus the easiest set's, ``(seeds,)``."""
    times = np.minimum(outcomes.from_json(found["times"][metric]), found["max_time"])
    return times[:, -1] - times[:, 0]


def _judge_panels(result: Result) -> Verdict:
    if not result["panels"]:
        return Verdict(NOT_TESTABLE, "this scale has no other data set")
    return judge_panels(result["panels"])


def _draw_panels(result: Result) -> Picture:
    return draw_panels(result["panels"]) if result["panels"] else plt.figure()


FIGURES = [
    Figure(
        "fig5",
        "During fine-tuning UA and MIA approach the oracle's, hard sets last; RA and "
        "TA end alike on all sets.",
        lambda scale: _fine_tuning(scale.sgd),
        _curves,
        _judge_curves,
        _draw_curves,
    ),
    Figure(
        "fig6",
        "L1-sparse unlearning: harder sets take longer.",
        _l1_units,
        lambda scale, workspace: panel(
            workspace, scale.sgd, "L1-sparse", strata(scale.sgd)
        ),
        judge_panel,
        lambda result: draw_panels({"L1-sparse": result}),
    ),
    Figure(
        "fig7",
        "Fine-tuning on other data sets and models: harder sets take longer.",
        _other_units,
        _others,
        _judge_panels,
        _draw_panels,
    ),
    Figure(
        "fig8",
        "Fine-tuning: harder sets take longer, for small and for large forget sets; "
        "the separation shrinks with size.",
        _size_units,
        _sizes,
        _judge_sizes,
        _draw_panels,
    ),
]
