"""Does the ranking depend on what is assumed? Appendix F.3, and the literal ratio.

Claim of ``ranks``: the ranking by privacy loss hardly depends on the assumed noise. The
paper reports Spearman's ρ of .70 between σ = .01 and .001, and .99 between .001, .0005
and .0001 (SVHN). Claim of ``literal``, beyond the paper: the paper's printed ratio uses
the noise on the mean gradient as if it were on the sum. The ratio is then the batch
size times the ratio of the mechanism that was run. Both give the same ranking.

Data: all training images of the main experiment and of the scale's other ones, SVHN
among them (``literal``: the main one only). Seeds: each seed's own ledger; intervals
cover trainings and the sample of examples. Settings: the paper's noise levels on the
mean gradient, and 0.1, the largest level it allows; the order is that of the other
figures.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.image import AxesImage

from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.judging.examples import above
from benchmarks.reproduce.judging.verdicts import Verdict, combined
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import NoiseRanks, Unit
from benchmarks.reproduce.workspace import Workspace

ON_MEAN = (0.1, 0.01, 0.001, 0.0005, 0.0001)
AGREE = 0.9


def _of_noises(experiment: Experiment) -> list[NoiseRanks]:
    """Return the jobs at the paper's noise levels, one per seed."""
    on_sum = tuple(std * experiment.recipe.batch_size for std in ON_MEAN)
    seeds = range(experiment.num_seeds)
    return [NoiseRanks(experiment, seed, on_sum) for seed in seeds]


def _of_ratios(experiment: Experiment) -> list[NoiseRanks]:
    """Return the jobs with the noise on the sum and the literal one, one per seed."""
    std = experiment.assumed_noise_std
    pair = (std * experiment.recipe.batch_size, std)
    seeds = range(experiment.num_seeds)
    return [NoiseRanks(experiment, seed, pair) for seed in seeds]


def _stability_units(scale: Scale) -> list[Unit]:
    return [u for one in (scale.sgd, *scale.others) for u in _of_noises(one)]


def _stability(scale: Scale, workspace: Workspace) -> Result:
    panels = {
        f"{one.dataset}, {one.recipe.model}": [
            unit.run(workspace) for unit in _of_noises(one)
        ]
        for one in (scale.sgd, *scale.others)
    }
    names = [f"{std:g}" for std in ON_MEAN]
    return {
        "label": "noise on the mean gradient",
        "names": names,
        "num_examples": len(workspace.images(scale.sgd).train),
        "panels": panels,
    }


def _literal(scale: Scale, workspace: Workspace) -> Result:
    experiment = scale.sgd
    panels = {
        experiment.dataset: [unit.run(workspace) for unit in _of_ratios(experiment)]
    }
    std = f"{experiment.assumed_noise_std:g}"
    names = [f"{std} on\nthe mean", f"{std} on\nthe sum"]
    label = "noise; on the mean: the mechanism's, on the sum: literal"
    number = len(workspace.images(experiment).train)
    return {"label": label, "names": names, "num_examples": number, "panels": panels}


def _judge(result: Result) -> Verdict:
    """Decide by the pair of noises that agrees least."""
    names = [name.replace("\n", " ") for name in result["names"]]
    number = result["num_examples"]
    return combined(
        {
            name: agreement(np.array(matrices), names, number)
            for name, matrices in result["panels"].items()
        }
    )


def agreement(matrices: np.ndarray, names: list[str], num_examples: int) -> Verdict:
    """Decide whether the lowest Spearman's rho is above ``AGREE``.

    Args:
        matrices: Correlations, ``(seeds, noises, noises)``.
        names: Names of the noises.
        num_examples: Number of examples that were ranked.
    """
    mean = matrices.mean(0)
    i, j = np.unravel_index(mean.argmin(), mean.shape)
    found = above(matrices[:, i, j], num_examples, AGREE, 4)
    pair = f"Spearman of the pair that agrees least, {names[i]} and {names[j]}"
    return Verdict(found.verdict, f"{pair}: {found.reason}")


def _draw(result: Result) -> Picture:
    panels = result["panels"]
    picture, axes = plt.subplots(
        1,
        len(panels),
        figsize=(3.7 * len(panels) + 0.9, 3.7),
        squeeze=False,
        layout="constrained",
    )
    for ax, (title, matrices) in zip(axes[0], panels.items(), strict=True):
        shown = _draw_matrix(ax, np.array(matrices), result["names"])
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel(result["label"], fontsize="small")
    label = f"Spearman's ρ, mean of {len(matrices)} seeds"
    picture.colorbar(shown, ax=axes, label=label)
    return picture


def _draw_matrix(ax: Axes, matrices: np.ndarray, names: list[str]) -> AxesImage:
    """Draw the mean correlations, with their values."""
    rho = matrices.mean(0)
    shown = ax.imshow(rho, vmin=0, vmax=1, cmap="cividis")
    for (i, j), value in np.ndenumerate(rho):
        colour = "white" if value < 0.6 else "black"
        ax.text(j, i, f"{value:.4f}", ha="center", va="center", color=colour, size=8)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    return shown


FIGURES = [
    Figure(
        "ranks",
        "The ranking by privacy loss hardly depends on the noise level (F.3).",
        _stability_units,
        _stability,
        _judge,
        _draw,
    ),
    Figure(
        "literal",
        "The paper's literal ratio ranks as the mechanism's does.",
        lambda scale: list(_of_ratios(scale.sgd)),
        _literal,
        _judge,
        _draw,
    ),
]
