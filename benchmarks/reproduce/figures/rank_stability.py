"""Does the ranking depend on what is assumed? Appendix F.3, and the literal ratio.

Claim of ``ranks``: the ranking by privacy loss hardly depends on the assumed noise. The
paper reports Spearman's ρ of .70 between σ = .01 and .001, and .99 between .001, .0005
and .0001 (SVHN). Claim of ``literal``, beyond the paper: the paper's printed ratio uses
the noise on the mean gradient as if it were on the sum. The ratio is then the batch
size times the ratio of the mechanism that was run. Both give the same ranking.

Data: all training images of the main experiment and of the scale's other ones, SVHN
among them (``literal``: the main one only). Seeds: each seed's own ledger over all
examples, and losses averaged over the seeds within each class; intervals are over
classes and trainings. Settings: the paper's noise levels on the mean gradient, and 0.1,
the largest level it allows; the order is that of the other figures. Primary statistic:
Spearman's ρ within classes of the pair of noises that agrees least, against 0.9 (a
limit fixed after ρ over all examples had been seen).
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.image import AxesImage

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.judging.examples import (
    Correlations,
    above,
    within_classes,
)
from benchmarks.reproduce.judging.verdicts import Verdict, combined
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import NoiseRanks, Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.accounting import privacy_losses

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


def _by_class(workspace: Workspace, units: list[NoiseRanks]) -> list:
    """Return Spearman's rho within each class, ``[class][noise][noise]``.

    The losses are averaged over the seeds. None stands for losses that do not vary.
    """
    experiment, stds = units[0].experiment, units[0].noise_stds
    ledgers = [workspace.ledger(experiment, one.seed) for one in units]
    losses = [
        privacy_losses([one.with_noise_std(std) for one in ledgers], experiment.order)
        for std in stds
    ]
    labels = workspace.images(experiment).train.tensors[1].numpy()
    found = [[within_classes(a, b, labels) for b in losses] for a in losses]
    return outcomes.to_json(np.round(np.moveaxis(found, 2, 0), 6))


def _stability_units(scale: Scale) -> list[Unit]:
    return [u for one in (scale.sgd, *scale.others) for u in _of_noises(one)]


def _panels(workspace: Workspace, units: dict[str, list[NoiseRanks]]) -> Result:
    """Return the matrices of all panels, by training and by class."""
    return {
        "panels": {
            name: [unit.run(workspace) for unit in of_panel]
            for name, of_panel in units.items()
        },
        "classes": {
            name: _by_class(workspace, of_panel) for name, of_panel in units.items()
        },
    }


def _stability(scale: Scale, workspace: Workspace) -> Result:
    units = {
        f"{one.dataset}, {one.recipe.model}": _of_noises(one)
        for one in (scale.sgd, *scale.others)
    }
    return {
        "label": "noise on the mean gradient",
        "names": [f"{std:g}" for std in ON_MEAN],
        "num_examples": len(workspace.images(scale.sgd).train),
        **_panels(workspace, units),
    }


def _literal(scale: Scale, workspace: Workspace) -> Result:
    experiment = scale.sgd
    std = f"{experiment.assumed_noise_std:g}"
    return {
        "label": "noise; on the mean: the mechanism's, on the sum: literal",
        "names": [f"{std} on\nthe mean", f"{std} on\nthe sum"],
        "num_examples": len(workspace.images(experiment).train),
        **_panels(workspace, {experiment.dataset: _of_ratios(experiment)}),
    }


def _judge(result: Result) -> Verdict:
    """Decide by the pair of noises that agrees least."""
    names = [name.replace("\n", " ") for name in result["names"]]
    of_classes = result.get("classes", {})
    return combined(
        {
            name: agreement(matrices, of_classes.get(name, []), names)
            for name, matrices in result["panels"].items()
        }
    )


def agreement(trainings: list, classes: list, names: list[str]) -> Verdict:
    """Decide whether the lowest Spearman's rho is above ``AGREE``.

    Args:
        trainings: A matrix of correlations for each training.
        classes: One for each class; empty if the classes were not stored.
        names: Names of the noises.
    """
    of_trainings, of_classes = (
        np.array(one, dtype=np.float64).reshape(-1, len(names), len(names))
        for one in (trainings, classes)
    )
    mean = (of_classes if len(of_classes) else of_trainings).mean(0)
    i, j = np.unravel_index(mean.argmin(), mean.shape)
    some = Correlations(of_trainings[:, i, j], of_classes[:, i, j])
    found = above(some, AGREE, 4, among=len(names) * (len(names) - 1) // 2)
    pair = f"the pair of noises that agrees least is {names[i]} and {names[j]}"
    return replace(found, remarks=(pair, *found.remarks))


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
        note="The loss is computed at five assumed noise levels from the same ledger "
        "of each training. No model was trained with another noise, so this says "
        "nothing of how noise changes training. The test is about the two levels that "
        "agree least. The level 0.1 is not the paper's. On SVHN the paper reports 0.70 "
        "between 0.01 and 0.001; our value is 1.00 (picture), and we do not know why. "
        "The picture shows correlations over all images.",
    ),
    Figure(
        "literal",
        "Beyond the paper: its literal ratio ranks as the mechanism's does.",
        lambda scale: list(_of_ratios(scale.sgd)),
        _literal,
        _judge,
        _draw,
        note="The *ratio* is that of gradient norm to noise, from which the loss is "
        "computed. The paper's printed formula uses the noise on the mean gradient as "
        "if it were on the sum over the batch. Both losses are computed from the same "
        "ledgers and differ only by this constant factor of the ratio.",
    ),
]
