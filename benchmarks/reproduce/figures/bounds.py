"""Bounds: figure 4, and beyond the paper the certified benchmark.

Figure 4: Theorem B.1 as printed for five strata of digits (MLP, SGLD), beside the
library's own group bounds; see ``benchmarks.group_bound``. Certified: steps until
(1, 1/n) by this library's bounds and by Corollary 4.4 for logistic regression with
every constant computed from the data; see ``benchmarks.certified_logistic``.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.bound_units import Certified, GroupBounds
from benchmarks.reproduce.figures.figure import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    Figure,
    Result,
    Verdict,
    ordering,
)
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from opacus_pi.plotting import plot_group_divergences

SHOWN = {"b1": "Theorem B.1 as printed", "coupled": "coupled bound"}
STEPS = ("shifted", "Corollary 4.4", "Chien et al.", "retraining")


def _group_units(scale: Scale) -> list[Unit]:
    return [GroupBounds(settings) for settings in scale.groups]


def _groups(scale: Scale, lab: Lab) -> Result:
    runs = [unit.run(lab)[:-1] for unit in _group_units(scale)]
    found = {
        name: [[row[name] for row in rows] for rows in runs]
        for name in ("mean_loss", *SHOWN)
    }
    return found | {"reliable": [[row["reliable"] for row in rows] for rows in runs]}


def _judge_groups(result: Result) -> Verdict:
    """Flat: no rise of Theorem B.1 with difficulty, seed by seed."""
    printed = ordering(np.array(result["b1"]))
    coupled = ordering(np.array(result["coupled"]))
    verdict = NOT_BORNE_OUT if printed.verdict == BORNE_OUT else BORNE_OUT
    because = f"Theorem B.1: {printed.because}; coupled bound: {coupled.because}"
    return Verdict(verdict, because)


def _draw_groups(result: Result) -> Picture:
    losses = np.array(result["mean_loss"]).mean(0)
    bounds = {text: np.array(result[name]) for name, text in SHOWN.items()}
    return plot_group_divergences(losses, bounds).figure


def _certified_units(scale: Scale) -> list[Unit]:
    return [Certified(scale.sgd.num_seeds)]


def _certified(scale: Scale, lab: Lab) -> Result:
    return {"rows": _certified_units(scale)[0].run(lab)}


def _judge_certified(result: Result) -> Verdict:
    rows = result["rows"]
    fewer = all(r["steps"]["shifted"] < r["steps"]["Corollary 4.4"] for r in rows)
    told = "; ".join(
        f"{row['num_points']} points: {row['steps']['shifted']} against "
        f"{row['steps']['Corollary 4.4']}"
        for row in rows
    )
    return Verdict(BORNE_OUT if fewer else NOT_BORNE_OUT, f"steps: {told}")


def _draw_certified(result: Result) -> Picture:
    picture, ax = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
    sizes = [row["num_points"] for row in result["rows"]]
    for name, marker in zip(STEPS, "osD^", strict=True):
        steps = [max(row["steps"][name], 0.5) for row in result["rows"]]
        ax.plot(sizes, steps, marker=marker, label=name)
    ax.set(xscale="log", yscale="log", xlabel="points to forget", ylabel="steps")
    ax.legend(frameon=False)
    return picture


FIGURES = [
    Figure(
        "fig4",
        "The group bound of Theorem B.1 does not rise with the difficulty of the set.",
        _group_units,
        _groups,
        _judge_groups,
        _draw_groups,
    ),
    Figure(
        "certified",
        "With known constants this library certifies unlearning in fewer steps than "
        "Corollary 4.4.",
        _certified_units,
        _certified,
        _judge_certified,
        _draw_certified,
    ),
]
