"""Beyond the paper: what there is to forget in models trained by DP-SGD.

Claim: harder sets are farther and slower to unlearn in these models, too, if clipping
leaves harder sets to choose. All examples that are clipped in every update share the
largest possible loss, and so do examples whose estimate was capped at it. If most
examples share it, there is no ranking.

Data: the scale's main data set; forget sets along the range of the mean privacy loss
over the seeds' ledgers, from observed norms. Seeds: ``num_seeds`` trainings; each set
is unlearned once per seed. Its oracles are trained once, by the same DP-SGD, and serve
all seeds. Settings: two pairs of clip norm and noise multiplier (``scales``), one with
strong privacy and clipping, one with little of both. Unlearning is fine-tuning without
noise; its learning rate is searched on a set of its own. Statistics: ``judging.order``.
"""

from dataclasses import replace

import numpy as np

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.drawing import draw_panels, table_of
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.order import judge_panel
from benchmarks.reproduce.judging.verdicts import (
    NOT_TESTABLE,
    Verdict,
    combined,
)
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.accounting import privacy_statement
from opacus_pi.difficulty.forget_sets import num_at_top

_METHOD = "fine-tune"
_DELTA = 1e-5


def _title(experiment: Experiment) -> str:
    recipe = experiment.recipe
    return f"clip norm {recipe.max_grad_norm:g}, noise {recipe.noise_multiplier:g}"


def _units(scale: Scale) -> list[Unit]:
    return [
        unit
        for experiment in scale.private
        for unit in outcomes.unlearnings(experiment, sets_of(experiment), _METHOD)
    ]


def _panel(workspace: Workspace, experiment: Experiment) -> Result:
    """Return times, ε, ties at the largest loss, and UA before and of the oracles."""
    sets = sets_of(experiment)
    losses = workspace.scores(experiment)["privacy loss"]
    return outcomes.panel_of(workspace, experiment, _METHOD, sets) | {
        "epsilon": _epsilon(workspace, experiment),
        "num_tied": num_at_top(losses),
        "num_examples": len(losses),
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
    clear = {
        title: found[title]
        for title, one in result["panels"].items()
        if not _mostly_tied(one)
    }
    if not clear:
        return Verdict(NOT_TESTABLE, parts=found)
    return replace(combined(clear), parts=found)


def _mostly_tied(found: Result) -> bool:
    return 2 * found["num_tied"] > found["num_examples"]


def _judge_one(found: Result) -> Verdict:
    """Decide about one panel; not testable if most examples share the largest loss."""
    order = judge_panel(found)
    hardest = -np.array(found["gaps"]["UA"])[:, -1, 0].mean()
    tied, total = found["num_tied"], found["num_examples"]
    because = (
        f"ε = {found['epsilon']:.3g} at δ = {_DELTA:g}; {tied:,} of {total:,} examples "
        f"share the largest loss; on the hardest set the oracles' UA exceeds the UA "
        f"before unlearning by {hardest:.3f}"
    )
    if _mostly_tied(found):
        return Verdict(NOT_TESTABLE, because, order.parts)
    return replace(order, reason="; ".join(filter(None, (because, order.reason))))


FIGURES = [
    Figure(
        "private",
        "Beyond the paper: harder sets are farther and slower in models trained by "
        "DP-SGD too, unless clipping gives most images the same loss.",
        _units,
        _result,
        _judge,
        lambda result: draw_panels(result["panels"]),
        lambda result: table_of(result["panels"]),
    )
]
