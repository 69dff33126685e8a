"""Beyond the paper: what there is to forget in models trained by DP-SGD.

Claim: harder sets take longer to unlearn in these models, too, if clipping leaves
harder sets to choose. All examples that are clipped in every update share the largest
possible loss, and so do examples whose estimate was capped at it. If most examples
share it, there is no ranking.

Data: the scale's main data set; five strata by mean privacy loss over the seeds'
ledgers, from observed norms. Seeds: ``num_seeds`` trainings; each stratum is unlearned
once per seed. Its oracles are trained once, by the same DP-SGD, and serve all seeds.
Settings: two pairs of clip norm and noise multiplier (``scales``), one with strong
privacy and clipping, one with little of both. Unlearning is fine-tuning without noise;
its learning rate is searched on a random set.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.times_to_unlearn import draw_panel, judge_panel, panel
from benchmarks.reproduce.figures.verdicts import (
    NOT_TESTABLE,
    Verdict,
    all_of,
    text_of,
)
from benchmarks.reproduce.forget_sets import strata
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.accounting import privacy_statement
from opacus_pi.difficulty.forget_sets import num_at_top
from opacus_pi.evaluation.intervals import mean_interval

_METHOD = "fine-tune"
_DELTA = 1e-5


def _title(experiment: Experiment) -> str:
    recipe = experiment.recipe
    return f"clip norm {recipe.max_grad_norm:g}, noise {recipe.noise_multiplier:g}"


def _units(scale: Scale) -> list[Unit]:
    return [
        unit
        for experiment in scale.private
        for unit in outcomes.unlearnings(experiment, strata(experiment), _METHOD)
    ]


def _panel(workspace: Workspace, experiment: Experiment) -> Result:
    """Return times, ε, ties at the largest loss, and UA before and of the oracles."""
    sets = strata(experiment)
    rows = outcomes.runs(workspace, experiment, sets, _METHOD)
    losses = workspace.scores(experiment)["privacy loss"]
    return panel(workspace, experiment, _METHOD, sets) | {
        "epsilon": _epsilon(workspace, experiment),
        "num_tied": num_at_top(losses),
        "num_examples": len(losses),
        "before": [[run["trace"][outcomes.UA][0] for run in row] for row in rows],
        "oracle": [
            outcomes.oracle_values(workspace, experiment, one)[outcomes.UA]
            for one in sets
        ],
    }


def _epsilon(workspace: Workspace, experiment: Experiment) -> float:
    """Return the worst-case ε of the DP-SGD run."""
    ledger = workspace.trained(experiment, 0)[1]
    return privacy_statement(ledger, [0], delta=_DELTA).worst_case


def _result(scale: Scale, workspace: Workspace) -> Result:
    return {"panels": {_title(one): _panel(workspace, one) for one in scale.private}}


def _judge(result: Result) -> Verdict:
    """Decide by the panels in which most losses differ; quote the numbers of all."""
    found = {title: _judge_one(one) for title, one in result["panels"].items()}
    clear = [
        found[title].verdict
        for title, one in result["panels"].items()
        if not _mostly_tied(one)
    ]
    return Verdict(all_of(clear) if clear else NOT_TESTABLE, parts=found)


def _mostly_tied(found: Result) -> bool:
    return 2 * found["num_tied"] > found["num_examples"]


def _judge_one(found: Result) -> Verdict:
    """Decide about one panel; not testable if most examples share the largest loss."""
    order = judge_panel(found)
    left = np.mean(found["oracle"][-1]) - np.array(found["before"])[:, -1]
    tied, total = found["num_tied"], found["num_examples"]
    because = (
        f"ε = {found['epsilon']:.3g} at δ = {_DELTA:g}; {tied:,} of {total:,} examples "
        f"share the largest loss; on the hardest set the oracles' UA exceeds the UA "
        f"before unlearning by {text_of(mean_interval(left))}"
    )
    verdict = NOT_TESTABLE if _mostly_tied(found) else order.verdict
    return Verdict(verdict, because, order.parts)


def _draw(result: Result) -> Picture:
    """Draw the times above, and the trained models' distance to the oracles below."""
    panels = result["panels"]
    picture, axes = plt.subplots(
        2,
        len(panels),
        figsize=(4.2 * len(panels), 6.4),
        squeeze=False,
        layout="constrained",
    )
    for (above, below), (title, found) in zip(axes.T, panels.items(), strict=True):
        draw_panel(above, title, found)
        _draw_before(below, found)
    return picture


def _draw_before(ax: Axes, found: Result) -> None:
    """Draw UA by stratum, with its spread over seeds and over oracles."""
    curves = {
        "before unlearning": np.array(found["before"]).T,
        "oracles": np.array(found["oracle"]),
    }
    for marker, (label, values) in zip("os", curves.items(), strict=True):
        strata_number = 1 + np.arange(len(values))
        ax.errorbar(
            strata_number,
            values.mean(1),
            values.std(1, ddof=1),
            marker=marker,
            capsize=3,
            label=f"{label} (mean ± std)",
        )
    ax.set(xlabel="stratum, easiest to hardest", ylabel="unlearning accuracy (error)")
    ax.set_xticks(strata_number)
    ax.legend(fontsize="small")


FIGURES = [
    Figure(
        "private",
        "Beyond the paper: harder sets take longer in models trained by DP-SGD too, "
        "where clipping leaves harder ones to choose.",
        _units,
        _result,
        _judge,
        _draw,
    )
]
