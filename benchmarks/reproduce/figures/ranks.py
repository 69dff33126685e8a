"""Does the ranking depend on what is assumed? Appendix F.3, and the literal ratio.

Stability: Spearman's rho between privacy losses at several noise levels of the same
ledgers. Literal: the paper's ratio takes the noise on the mean gradient as if it were
on the sum, so it is the batch size times the mechanism's; do both rank alike?
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.figures.figure import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    Figure,
    Result,
    Verdict,
)
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit, trainings
from opacus_pi.correlations import RankCorrelations, rank_stability

ON_MEAN = (0.005, 0.01, 0.02, 0.05)
AGREE = 0.9


def _units(scale: Scale) -> list[Unit]:
    return list(trainings(scale.sgd))


def _matrix(lab: Lab, scale: Scale, noise_stds: list[float]) -> Result:
    experiment = scale.sgd
    found: RankCorrelations = rank_stability(
        lab.ledgers(experiment), noise_stds, experiment.order
    )
    return {"noise_on_sum": noise_stds, "rho": found.rho.tolist()}


def _stability(scale: Scale, lab: Lab) -> Result:
    batch = scale.sgd.recipe.batch_size
    return {"noise_on_mean": ON_MEAN} | _matrix(
        lab, scale, [std * batch for std in ON_MEAN]
    )


def _literal(scale: Scale, lab: Lab) -> Result:
    std, batch = scale.sgd.assumed_noise_std, scale.sgd.recipe.batch_size
    return {"noise_on_mean": [std * batch, std]} | _matrix(
        lab, scale, [std * batch, std]
    )


def _judge(result: Result) -> Verdict:
    least = float(np.min(result["rho"]))
    verdict = BORNE_OUT if least >= AGREE else NOT_BORNE_OUT
    return Verdict(verdict, f"smallest Spearman of any pair {least:.3f}")


def _draw(result: Result) -> Picture:
    picture, ax = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
    rho, names = np.array(result["rho"]), [f"{s:g}" for s in result["noise_on_mean"]]
    shown = ax.imshow(rho, vmin=0, vmax=1, cmap="cividis")
    for (i, j), value in np.ndenumerate(rho):
        colour = "white" if value < 0.6 else "black"
        ax.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("assumed noise on the mean gradient")
    picture.colorbar(shown, label="Spearman's ρ of the rankings")
    return picture


FIGURES = [
    Figure(
        "ranks",
        "The ranking by privacy loss hardly depends on the noise level (F.3).",
        _units,
        _stability,
        _judge,
        _draw,
    ),
    Figure(
        "literal",
        "The paper's literal ratio ranks as the mechanism's does.",
        _units,
        _literal,
        _judge,
        _draw,
    ),
]
