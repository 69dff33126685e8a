"""Figure 1, right: loss barriers before and after unlearning, and between oracles.

Claim: the barrier between the trained model and an oracle rises with the privacy loss
of the forget set; fine-tuning reduces it to the level between two oracles.

Data: the scale's main experiment. Barriers are modulo permutation (weight matching), as
in section 5.2. The paper does not say on which examples the loss is measured, so two
sets are used: a fixed part of the training images (``num_probe`` of them, forgotten
ones included) and of the test images. Seeds: one model per seed, before and after
fine-tuning. It is compared with an oracle of its own if there are enough, else with all
oracles. The baseline is every pair of oracles of a set. It needs ten pairs, so each set
has five oracles here, even where the other figures have fewer, and the settings of
fine-tuning are searched with these. Settings: 11 points on the line; the running
statistics of BatchNorm are recomputed at each. Primary statistics, with the forget set
as the unit: the rank correlation of the barrier before with the difficulty; on the
harder half of the sets, the mean relative reduction; and on each of them a barrier of
at most 1.5 times the mean between the set's own oracles. They were fixed after five
strata had been seen, and before a run with more sets.
"""

from dataclasses import replace
from math import comb

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture
from numpy.typing import NDArray

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.barrier_units import (
    SETS,
    BarrierAfter,
    BarrierBaseline,
    BarrierBefore,
    Barriers,
)
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import sets_of
from benchmarks.reproduce.judging.contrasts import larger
from benchmarks.reproduce.judging.equivalence import at_most
from benchmarks.reproduce.judging.order import FEWEST_SETS, rising
from benchmarks.reproduce.judging.verdicts import NOT_TESTABLE, Verdict, combined
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.plotting import plot_barriers

METHOD = "fine-tune"
FEWEST_ORACLES = 5  # of a set
FEWEST_PAIRS = comb(FEWEST_ORACLES, 2)  # to know how much their barriers vary
MOST = 1.5  # times the barrier between oracles: as between oracles


def with_pairs(experiment: Experiment) -> Experiment:
    """Return the experiment with enough oracles of each set for the baseline."""
    return replace(experiment, num_oracles=max(experiment.num_oracles, FEWEST_ORACLES))


def befores(experiment: Experiment) -> list[list[BarrierBefore]]:
    """Return the jobs before unlearning, ``[seed][set]``."""
    sets, seeds = sets_of(experiment), range(experiment.num_seeds)
    return [[BarrierBefore(experiment, one, seed) for one in sets] for seed in seeds]


def afters(experiment: Experiment, method: str) -> list[list[BarrierAfter]]:
    """Return the jobs after unlearning, ``[seed][set]``."""
    return [
        [BarrierAfter(experiment, one.forget_set, method, one.seed) for one in row]
        for row in befores(experiment)
    ]


def baselines(experiment: Experiment) -> list[BarrierBaseline]:
    """Return the jobs between oracles, one per set."""
    return [BarrierBaseline(experiment, one) for one in sets_of(experiment)]


def by_examples(
    workspace: Workspace, rows: list[list[BarrierBefore]] | list[list[BarrierAfter]]
) -> dict[str, list[list[float]]]:
    """Return, for each set of examples, means over oracles, ``[seed][set]``."""
    measured = [[unit.run(workspace) for unit in row] for row in rows]
    return {
        name: [[_mean(found, name) for found in row] for row in measured]
        for name in SETS
    }


def between_oracles(
    workspace: Workspace, units: list[BarrierBaseline]
) -> dict[str, list[list[float]]]:
    """Return, for each set of examples, barriers of all pairs, ``[set][pair]``."""
    measured = [unit.run(workspace) for unit in units]
    return {name: [[one[name] for one in row] for row in measured] for name in SETS}


def _mean(found: list[Barriers], name: str) -> float:
    return float(np.mean([one[name] for one in found]))


def _units(scale: Scale) -> list[Unit]:
    experiment = with_pairs(scale.sgd)
    rows = [*befores(experiment), *afters(experiment, METHOD)]
    return [*(unit for row in rows for unit in row), *baselines(experiment)]


def _result(scale: Scale, workspace: Workspace) -> Result:
    experiment = with_pairs(scale.sgd)
    losses = outcomes.mean_losses(workspace, experiment, sets_of(experiment))
    return {
        "mean_losses": losses.tolist(),
        "before": by_examples(workspace, befores(experiment)),
        "after": by_examples(workspace, afters(experiment, METHOD)),
        "baseline": between_oracles(workspace, baselines(experiment)),
    }


def _judge(result: Result) -> Verdict:
    found: dict[str, Verdict] = {}
    for name in result["before"]:
        before, after = (np.array(result[when][name]) for when in ("before", "after"))
        baseline = np.array(result["baseline"][name])
        if max(before.max(), after.max(), baseline.max()) == 0:
            found[name] = Verdict(
                NOT_TESTABLE, "there is no barrier between any two models"
            )
            continue
        parts = {
            "rises with the loss before": rising(
                result["mean_losses"], before, "the barrier before unlearning"
            ),
            "reduced on the harder half": _reduced(before, after),
            "then as between oracles": _comparable(after, baseline),
        }
        found |= {f"{name}, {part}": verdict for part, verdict in parts.items()}
    return combined(found)


def _harder(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the harder half of the sets, ``(seeds, sets)``; at least eight."""
    number = values.shape[1]
    return values[:, -max(number // 2, min(number, FEWEST_SETS)) :]


def _reduced(before: NDArray[np.float64], after: NDArray[np.float64]) -> Verdict:
    """Decide whether unlearning reduces the barrier on the harder sets."""
    return larger(
        _harder(before), _harder(after), "share by which the barrier is reduced"
    )


def _comparable(after: NDArray[np.float64], baseline: NDArray[np.float64]) -> Verdict:
    """Decide whether the barrier is about as high as between oracles, on each set.

    Args:
        after: Barriers, ``(seeds, sets)``.
        baseline: Barriers between oracles, ``(sets, pairs)``.
    """
    if baseline.shape[1] < FEWEST_PAIRS:
        return Verdict(
            NOT_TESTABLE,
            f"{baseline.shape[1]} pairs of oracles for each set; at least "
            f"{FEWEST_PAIRS} are needed",
        )
    return at_most(_harder(after), _harder(baseline.T).T, MOST, "barrier")


def _draw(result: Result) -> Picture:
    names = list(result["before"])
    picture, axes = plt.subplots(
        1, len(names), figsize=(4.6 * len(names), 3.8), layout="constrained"
    )
    for ax, name in zip(axes, names, strict=True):
        before, after = result["before"][name], result["after"][name]
        losses = np.tile(result["mean_losses"], (len(before), 1))
        pairs = np.array(result["baseline"][name]).T
        plot_barriers(losses, before, after, pairs, ax=ax)
        ax.set_title(f"loss on {name}", fontsize="medium")
    return picture


FIGURES = [
    Figure(
        "fig1-right",
        "The barrier to an oracle before unlearning rises with the privacy loss; "
        "unlearning reduces it to the barrier between oracles.",
        _units,
        _result,
        _judge,
        _draw,
    )
]
