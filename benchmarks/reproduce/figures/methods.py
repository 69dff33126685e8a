"""Beyond the paper: every unlearning method against the difficulty of the forget set.

Claim: with every method harder sets are farther and slower, and the hardest quarter is
slower than the others on average. It need not be the slowest quarter.

Data, model, seeds and forget sets are those of figure 1 (middle). Settings: searched
once for each method, on a set of its own. Statistics: those of ``judging.order``, by
UA. *Hardest quarter*: the share of the gap that remained on the hardest quarter of the
sets that have something to forget (at least four sets), against the mean of the others,
by permutation of the sets; the means of all quarters are given. The table shows where
each method ended: a method that moves the model beyond the oracles has overshot, and
one that costs test accuracy has damaged it. Loss barriers are measured after
fine-tuning only, in figure 1 (right).
"""

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.drawing import draw_panels, table_of
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.order import by_claim, judge_order
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.speeds import judge_hardest
from benchmarks.reproduce.judging.verdicts import Verdict, combined
from benchmarks.reproduce.methods import METHODS
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Search, Unit
from benchmarks.reproduce.workspace import Workspace

NAMES = [name for name, method in METHODS.items() if method.ranges]


def _units(scale: Scale) -> list[Unit]:
    experiment, sets = scale.sgd, sets_of(scale.sgd)
    return [
        unit
        for name in _names(scale)
        for unit in outcomes.unlearnings(experiment, sets, name)
    ]


def _names(scale: Scale) -> list[str]:
    """Return the methods that are studied at this scale, the user's own ones last."""
    known = [name for name in NAMES if not scale.methods or name in scale.methods]
    return [*known, *scale.own_methods]


def _result(scale: Scale, workspace: Workspace) -> Result:
    experiment, sets = scale.sgd, sets_of(scale.sgd)
    searched = {name: Search(experiment, name).run(workspace) for name in _names(scale)}
    return {
        "panels": {
            name: outcomes.panel_of(workspace, experiment, name, sets)
            for name in searched
        },
        "settings": {name: one["settings"] for name, one in searched.items()},
        "informative": {name: one["informative"] for name, one in searched.items()},
    }


def _judge(result: Result) -> Verdict:
    runs = {n: Runs.of_panel(one, "UA") for n, one in result["panels"].items()}
    orders = {name: judge_order(one) for name, one in runs.items()}
    hardest = {name: judge_hardest(runs[name], one) for name, one in orders.items()}
    order = by_claim(orders)
    return combined(order.parts | {"hardest quarter slower": combined(hardest)})


def _table(result: Result) -> str:
    """Return a Markdown table of the methods, and their settings."""
    settings = "; ".join(
        f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in one.items())
        for name, one in result["settings"].items()
    )
    idle = [name for name, one in result["informative"].items() if not one]
    searched = f"\nSettings found by the search: {settings}.\n"
    if idle:
        searched += (
            f"The search could not distinguish the settings for {', '.join(idle)}.\n"
        )
    return table_of(result["panels"], ("UA",)) + searched


FIGURES = [
    Figure(
        "methods",
        "Beyond the paper: the privacy loss predicts difficulty for every unlearning "
        "method: harder sets are farther and slower, and the hardest quarter is slower "
        "than the rest.",
        _units,
        _result,
        _judge,
        lambda result: draw_panels(result["panels"]),
        _table,
    )
]
