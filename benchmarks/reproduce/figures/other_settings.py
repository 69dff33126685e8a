"""Time to unlearn in other settings: figures 5 to 8.

Claims. Figure 5: during fine-tuning UA and MIA approach the oracle's, hard sets more
slowly, and RA and TA end within five points of each other on all sets. Figure 6: with
L1-sparse unlearning harder sets are farther and slower. Figure 7: so they are with
fine-tuning on other data sets and models. Figure 8: so they are for small and for large
forget sets, and the difference between hard and easy sets shrinks with their size.

Data: the scale's main data set (figure 7: its other ones); forget sets along the range
of the mean privacy loss over the seeds' ledgers, of the scale's size (figure 8: of
several sizes). Seeds: ``num_seeds`` trainings; each set is unlearned once per seed. The
oracles of a set are trained once and serve all seeds. Settings: the learning rate, and
L1's strength, are searched on a set of its own. Primary statistics: those of
``judging.order``. Figure 5 also asks whether the gap shrinks relative to itself, on
average over the sets with something to forget, and whether the accuracies of any two
sets differ by less than five points in trainings like those that were run. Figure 8
also asks whether the gap before unlearning, and the share of it that remained, separate
the halves less for the largest sets than for the smallest; sizes between them are not
compared. The share is compared at the positions in the ranking that have something to
forget at both sizes.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.drawing import draw_panels, table_of
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.contrasts import shrinks
from benchmarks.reproduce.judging.equivalence import alike
from benchmarks.reproduce.judging.order import (
    FARTHER,
    SLOWER,
    judge_panel,
    judge_panels,
    judge_slower,
)
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.speeds import judge_approach, judge_shrinking
from benchmarks.reproduce.judging.verdicts import Verdict, combined
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.plotting.style import styles

_UTILITY = {"RA": "retain_accuracy", "TA": "test_accuracy"}
_ALIKE = 0.05  # accuracies of two sets that differ by less than this are alike


def _fine_tuning(experiment: Experiment, size: int = 0) -> list[Unit]:
    sets = sets_of(experiment, size)
    return list(outcomes.unlearnings(experiment, sets, "fine-tune"))


def _curves(scale: Scale, workspace: Workspace) -> Result:
    experiment, sets = scale.sgd, sets_of(scale.sgd)
    rows = outcomes.runs(workspace, experiment, sets, "fine-tune")
    return outcomes.panel_of(workspace, experiment, "fine-tune", sets) | {
        "utility": {
            name: [[run["trace"][metric][-1] for run in row] for row in rows]
            for name, metric in _UTILITY.items()
        },
    }


def _judge_curves(result: Result) -> Verdict:
    """Decide whether gaps close, more slowly on hard sets, and utility is alike."""
    found = {}
    for name in result["gaps"]:
        runs = Runs.of_panel(result, name)
        found[f"{name}, approaches the oracle's"] = judge_approach(runs)
        found[f"{name}, hard sets more slowly"] = judge_slower(runs)
    for name, ends in result["utility"].items():
        found[f"{name} alike"] = alike(ends, _ALIKE, "accuracy")
    return combined(found)


def _draw_curves(result: Result) -> Picture:
    """Draw the gap over the epochs, a curve per quarter of the sets."""
    picture, axes = plt.subplots(
        1,
        len(result["gaps"]),
        figsize=(8.4, 3.6),
        squeeze=False,
        layout="constrained",
    )
    for ax, name in zip(axes[0], result["gaps"], strict=True):
        path = Runs.of_panel(result, name).gaps.mean(0)
        parts = np.array_split(path, 4)
        names = ("easiest quarter", "second", "third", "hardest quarter")
        for part, label, style in zip(parts, names, styles(), strict=False):
            ax.plot(range(path.shape[1]), part.mean(0), label=label, **style)
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(xlabel="epochs", ylabel=f"{name} minus the oracles'")
        ax.legend(frameon=False, fontsize="small")
    return picture


def _l1_units(scale: Scale) -> list[Unit]:
    return list(outcomes.unlearnings(scale.sgd, sets_of(scale.sgd), "L1-sparse"))


def _title(experiment: Experiment) -> str:
    return f"{experiment.dataset}, {experiment.recipe.model}"


def _other_units(scale: Scale) -> list[Unit]:
    return [unit for experiment in scale.others for unit in _fine_tuning(experiment)]


def _others(scale: Scale, workspace: Workspace) -> Result:
    return {
        "panels": {
            _title(one): outcomes.panel_of(workspace, one, "fine-tune", sets_of(one))
            for one in scale.others
        }
    }


def _size_units(scale: Scale) -> list[Unit]:
    return [u for size in scale.set_sizes for u in _fine_tuning(scale.sgd, size)]


def _sizes(scale: Scale, workspace: Workspace) -> Result:
    return {
        "panels": {
            f"forget sets of {size:,}": outcomes.panel_of(
                workspace, scale.sgd, "fine-tune", sets_of(scale.sgd, size)
            )
            for size in scale.set_sizes
        }
    }


def _judge_sizes(result: Result) -> Verdict:
    """Decide about every size, and whether the separation shrinks with the size."""
    panels = list(result["panels"].values())
    found = {"order": judge_panels(result["panels"])}
    for metric in outcomes.METRICS:
        pair = [Runs.of_panel(panels[k], metric) for k in (0, -1)]
        gaps = [one.to_go[:, :, 0] for one in pair]
        name = f"separation by {metric}"
        found[f"{name}, {FARTHER}"] = shrinks(*gaps, "gap before unlearning")
        found[f"{name}, {SLOWER}"] = judge_shrinking(*pair)
    return combined(found)


def _draw_panels(result: Result) -> Picture:
    return draw_panels(result["panels"]) if result["panels"] else plt.figure()


FIGURES = [
    Figure(
        "fig5",
        "During fine-tuning UA and MIA approach the oracle's, hard sets more slowly; "
        "RA and TA end alike on all sets.",
        lambda scale: _fine_tuning(scale.sgd),
        _curves,
        _judge_curves,
        _draw_curves,
        note="The picture shows each measure minus that of the mean oracle, which is "
        "the gap with its sign reversed: the mean over the trainings and over a "
        "quarter of the sets. RA and TA are not drawn.",
    ),
    Figure(
        "fig6",
        "L1-sparse unlearning: harder sets are farther and slower.",
        _l1_units,
        lambda scale, workspace: outcomes.panel_of(
            workspace, scale.sgd, "L1-sparse", sets_of(scale.sgd)
        ),
        judge_panel,
        lambda result: draw_panels({"L1-sparse": result}),
        lambda result: table_of({"L1-sparse": result}),
    ),
    Figure(
        "fig7",
        "Fine-tuning on other data sets and models: harder sets are farther and "
        "slower.",
        _other_units,
        _others,
        lambda result: judge_panels(result["panels"]),
        _draw_panels,
        lambda result: table_of(result["panels"]),
    ),
    Figure(
        "fig8",
        "Fine-tuning: harder sets are farther and slower, for small and for large "
        "forget sets; the separation shrinks with size.",
        _size_units,
        _sizes,
        _judge_sizes,
        _draw_panels,
        lambda result: table_of(result["panels"]),
    ),
]
