"""Beyond the paper: epochs predicted before the run against epochs taken.

Claim: at equal cost, budgets from the privacy loss leave more sets at the oracle than
one budget for all sets.

Data, model, seeds, strata and settings are those of figure 1 (middle), for three
methods that train on the retained images. Intervals are over seeds. For each seed, the
times of the other seeds' runs are fitted against the logarithm of the privacy loss, as
``Unlearner.plan`` does; a run that never reached the oracle counts as its length. Three
policies are compared over all runs of the seed: stop when the oracle is reached, within
a budget of twice the prediction; one fixed budget; and a fixed budget that costs as
much as the first policy on average.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.verdicts import Verdict, combined, of_interval
from benchmarks.reproduce.forget_sets import STRATA, strata
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation.intervals import mean_interval
from opacus_pi.plotting.style import styles
from opacus_pi.unlearning.plan import budget_of, predict_time

TOLERANCE = 0.05
_BESIDE = {
    "xytext": (6, -8),
    "textcoords": "offset points",
    "fontsize": "small",
    "color": "grey",
}
METHODS = ("fine-tune", "Langevin", "L1-sparse")


def _units(scale: Scale) -> list[Unit]:
    sets = strata(scale.sgd)
    return [u for name in METHODS for u in outcomes.unlearnings(scale.sgd, sets, name)]


def _result(scale: Scale, workspace: Workspace) -> Result:
    return {"panels": {name: _panel(scale, workspace, name) for name in METHODS}}


def _panel(scale: Scale, workspace: Workspace, method: str) -> Result:
    """Return predictions and times of a method, and cost and success of each policy."""
    experiment, sets = scale.sgd, strata(scale.sgd)
    losses = outcomes.mean_losses(workspace, experiment, sets)
    times = outcomes.times(workspace, experiment, sets, method)
    gaps = _gaps(workspace, scale, method)
    most, seeds = experiment.unlearn_epochs, range(len(times))
    predicted = np.array([_predict(losses, times, seed, most) for seed in seeds])
    budgets = np.minimum([[budget_of(p) for p in row] for row in predicted], most)
    adaptive = np.minimum(times, budgets)
    alike = np.full_like(budgets, max(1, round(float(adaptive.mean()))))
    policies = {
        "adaptive": adaptive,
        "fixed, all": np.full_like(budgets, most),
        "fixed, same cost": alike,
    }
    return {
        "mean_losses": losses.tolist(),
        "times": outcomes.to_json(times),
        "predicted": predicted.tolist(),
        "max_time": most,
        "policies": {name: _score(gaps, spent) for name, spent in policies.items()},
    }


def _predict(
    losses: np.ndarray, times: np.ndarray, seed: int, length: int
) -> list[float]:
    """Return predictions for a seed from all other seeds' runs, each of this length."""
    others = np.delete(times, seed, axis=0)
    past = np.tile(losses, len(others))
    found = [
        predict_time(loss, past, others.ravel(), past_lengths=length) for loss in losses
    ]
    return [0.0 if one is None else one for one in found]


def _gaps(workspace: Workspace, scale: Scale, method: str) -> np.ndarray:
    """Return the distance of UA from the mean oracle, ``(seeds, sets, epochs)``."""
    experiment, sets = scale.sgd, strata(scale.sgd)
    judges = [outcomes.oracle_values(workspace, experiment, one) for one in sets]
    rows = outcomes.runs(workspace, experiment, sets, method)
    return np.array(
        [
            [
                np.abs(np.array(run["trace"][outcomes.UA]) - np.mean(j[outcomes.UA]))
                for run, j in zip(row, judges, strict=True)
            ]
            for row in rows
        ]
    )


def _score(gaps: np.ndarray, spent: np.ndarray) -> dict[str, Any]:
    """Return epochs spent and share of sets at the oracle in the end, by seed."""
    spent = spent.astype(np.int64)
    final = np.take_along_axis(gaps, spent[..., None], axis=2)[..., 0]
    there = final <= TOLERANCE
    return {"epochs": spent.mean(1).tolist(), "unlearned": there.mean(1).tolist()}


def _judge(result: Result) -> Verdict:
    return combined({name: _judge_panel(p) for name, p in result["panels"].items()})


def _judge_panel(found: Result) -> Verdict:
    """Decide whether budgets from the loss leave more sets at the oracle."""
    taken = np.minimum(outcomes.from_json(found["times"]), found["max_time"])
    error = np.abs(np.array(found["predicted"]) - taken).mean()
    policies = found["policies"]
    counts = "; ".join(
        f"{name}: {np.mean(p['epochs']):.1f} epochs, "
        f"{100 * np.mean(p['unlearned']):.0f} % at the oracle"
        for name, p in policies.items()
    )
    gain = np.subtract(
        policies["adaptive"]["unlearned"], policies["fixed, same cost"]["unlearned"]
    )
    more = mean_interval(gain)
    because = (
        f"mean error of the prediction {error:.1f} epochs; {counts}; adaptive - fixed "
        f"at the same cost {more.estimate:.2f} [{more.low:.2f}, {more.high:.2f}], "
        f"n = {len(gain)}"
    )
    return Verdict(of_interval(more.low, more.high), because)


def _draw(result: Result) -> Picture:
    panels = result["panels"]
    picture, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained"
    )
    for ax, (method, found) in zip(axes, panels.items(), strict=True):
        most = found["max_time"]
        taken = np.minimum(outcomes.from_json(found["times"]), most)
        predicted = np.array(found["predicted"])
        for number, (place, style) in enumerate(zip(STRATA, styles(), strict=False)):
            x, y = predicted[:, number], taken[:, number]
            ax.scatter(x, y, label=place, alpha=0.8, zorder=2, **style)
        ax.plot([0, most], [0, most], color="grey", lw=1, zorder=1)
        ax.annotate("as predicted", (0.8 * most, 0.8 * most), **_BESIDE)
        ax.set_xlabel("epochs predicted before the run")
        ax.set_title(method, fontsize="medium")
    axes[0].set_ylabel(f"epochs taken (never: {most})")
    axes[0].legend(frameon=False, title="stratum")
    return picture


FIGURES = [
    Figure(
        "predicted",
        "The privacy loss predicts how long unlearning takes: at equal cost, budgets "
        "from it leave more sets at the oracle than one budget for all sets.",
        _units,
        _result,
        _judge,
        _draw,
    )
]
