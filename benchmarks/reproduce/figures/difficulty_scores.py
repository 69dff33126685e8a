"""Scores of difficulty beside the privacy loss: figures 2 and 3.

Claim of figure 2: the five proxies of section 5.3 correlate highly with the privacy
loss, the mean gradient norm best. Claim of figure 3: the hardest sets by privacy loss
are farther and slower to unlearn than those by three of the proxies, at several sizes.

Data: all training images of the scale's main experiment. Seeds: figure 2 uses
Spearman's ρ within classes, of up to 1,000 examples drawn at random, by scores averaged
over the seeds' ledgers; its intervals are over classes, and over the trainings' own
ledgers. Figure 3 uses ``num_seeds`` trainings; examples are ranked by means over all
ledgers. For each score and size, the hardest examples (four times the size) are divided
at random into four disjoint sets; each is unlearned once per seed. Settings: proxies
are computed from the rows of the ledger (the paper has mean norm and confidence at
every epoch); fine-tuning as in figure 1 (middle). Primary statistics: ρ against 0.5 (a
limit fixed after ρ over all examples had been seen); gap before unlearning, and share
of it that remained, of the four sets of one score against the four of another, by
permutation of the sets and by Welch's test, with the share of examples that both scores
chose.
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.forget_sets import LOSS, hardest_sets
from benchmarks.reproduce.judging.contrasts import groups_differ
from benchmarks.reproduce.judging.examples import (
    Correlations,
    above,
    ahead,
    within_classes,
)
from benchmarks.reproduce.judging.order import FARTHER, SLOWER, cannot_compare
from benchmarks.reproduce.judging.runs import ACCOUNTS, SLOWNESS, Runs
from benchmarks.reproduce.judging.verdicts import (
    NOT_TESTABLE,
    Verdict,
    agreed,
    combined,
)
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import ProxyRanks, Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.plotting import plot_proxies
from opacus_pi.plotting.style import styles

BEST = "mean norm"
HIGH = 0.5  # Spearman's rho above this is called high
HARDEST_BY = (LOSS, "C-Proxy", "mean norm", "EL2N")


def _proxy_units(scale: Scale) -> list[ProxyRanks]:
    return [ProxyRanks(scale.sgd, seed) for seed in range(scale.sgd.num_seeds)]


def _proxies(scale: Scale, workspace: Workspace) -> Result:
    scores = workspace.scores(scale.sgd)
    runs = [unit.run(workspace) for unit in _proxy_units(scale)]
    shown = outcomes.drawn_examples(len(scores[LOSS]))
    labels = workspace.images(scale.sgd).train.tensors[1].numpy()
    return {
        "num_examples": len(scores[LOSS]),
        "rho": {name: [run[name] for run in runs] for name in runs[0]},
        "drawn": {
            name: outcomes.rounded_to_json(v[shown]) for name, v in scores.items()
        },
        "classes": labels[shown].tolist(),
    }


def _judge_proxies(result: Result) -> Verdict:
    """Decide whether every rho is high and the mean norm's the highest."""
    found = {name: _correlations(result, name) for name in result["rho"]}
    high = {name: above(one, HIGH) for name, one in found.items()}
    best = found.pop(BEST)
    lead = {f"over {name}": ahead(best, one) for name, one in found.items()}
    return combined(
        {"high correlation": combined(high), f"{BEST} best": combined(lead)}
    )


def _correlations(result: Result, name: str) -> Correlations:
    """Return a proxy's correlations with the loss, of trainings and within classes."""
    classes, drawn = result.get("classes"), result["drawn"]
    of_classes = (
        within_classes(drawn[LOSS], drawn[name], classes) if classes else np.array([])
    )
    return Correlations(np.array(result["rho"][name], dtype=np.float64), of_classes)


def _draw_proxies(result: Result) -> Picture:
    scores = {name: np.array(values) for name, values in result["drawn"].items()}
    losses = scores.pop(LOSS)
    bins = min(30, len(losses) // 5)
    ax = plot_proxies(losses, scores, num_bins=bins)
    handles, _ = ax.get_legend_handles_labels()
    rho = {name: np.mean(values) for name, values in result["rho"].items()}
    names = [f"{name} (mean ρ = {rho[name]:.2f})" for name in scores]
    ax.legend(handles, names, frameon=False, fontsize="small")
    ax.set_title(f"{len(losses):,} examples, {bins} bins", fontsize="medium")
    return ax.figure


def _hardest_units(scale: Scale) -> list[Unit]:
    return [
        unit
        for size in scale.hardest_sizes
        for score in HARDEST_BY
        for unit in outcomes.unlearnings(
            scale.sgd, hardest_sets(size, score), "fine-tune"
        )
    ]


def _hardest_result(scale: Scale, workspace: Workspace) -> Result:
    return {
        "sizes": {
            str(size): {
                score: _of_score(scale, workspace, size, score) for score in HARDEST_BY
            }
            for size in scale.hardest_sizes
        }
    }


def _of_score(scale: Scale, workspace: Workspace, size: int, score: str) -> Result:
    """Return the panel of a score's sets, and the share of examples of the loss's."""
    sets = hardest_sets(size, score)
    chosen, by_loss = (
        {int(index) for one in some for index in one.indices(workspace, scale.sgd)}
        for some in (sets, hardest_sets(size, LOSS))
    )
    panel = outcomes.panel_of(workspace, scale.sgd, "fine-tune", sets)
    return panel | {"overlap": len(chosen & by_loss) / len(chosen)}


def _judge_hardest(result: Result) -> Verdict:
    """Compare the sets of the privacy loss with those of each other score."""
    found = {}
    for size, scores in result["sizes"].items():
        for metric in scores[LOSS]["gaps"]:
            for score in HARDEST_BY[1:]:
                name = f"sets of {int(size):,}, {metric}, {LOSS} - {score}"
                found[name] = _harder(scores[LOSS], scores[score], metric)
    return combined(found)


def _harder(of_loss: Result, other: Result, metric: str) -> Verdict:
    """Compare gaps and speeds, if there was something to forget and it was."""
    pair = [Runs.of_panel(one, metric) for one in (of_loss, other)]
    shared = f"both scores chose {100 * other['overlap']:.0f} % of the examples"
    reason = next(filter(None, map(cannot_compare, pair)), "")
    if reason:
        return Verdict(NOT_TESTABLE, f"{reason}; {shared}")
    gaps = [one.to_go[:, :, 0] for one in pair]
    accounts = zip(*(one.accounts() for one in pair), strict=True)
    speeds = [[one.slowness() for one in account] for account in accounts]
    what = f"difference of the mean {SLOWNESS}"
    parts = {
        FARTHER: groups_differ(*gaps, "difference of the mean gaps before unlearning"),
        SLOWER: agreed((groups_differ(*one, what) for one in speeds), ACCOUNTS),
    }
    return replace(combined(parts), reason=shared)


def _draw_hardest(result: Result) -> Picture:
    """Draw the area under the gap of every set, by score, for each size."""
    sizes = result["sizes"]
    metrics = list(next(iter(sizes.values()))[LOSS]["gaps"])
    picture, axes = plt.subplots(
        1,
        len(metrics),
        figsize=(4.2 * len(metrics), 3.6),
        squeeze=False,
        layout="constrained",
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        for (size, scores), style in zip(sizes.items(), styles(), strict=False):
            areas = np.array(
                [
                    Runs.of_panel(scores[name], metric).of_sets()["area"]
                    for name in HARDEST_BY
                ]
            )
            places = np.tile(np.arange(len(HARDEST_BY))[:, None], areas.shape[1])
            label = f"sets of {int(size):,}"
            ax.scatter(places.ravel(), areas.ravel(), label=label, **style)
        ax.set_xticks(range(len(HARDEST_BY)), HARDEST_BY, fontsize="small")
        ax.set(title=f"by {metric}", ylabel="area under the gap (gap × epochs)")
        ax.legend(frameon=False, fontsize="small")
    return picture


FIGURES = [
    Figure(
        "fig2",
        "All proxies correlate highly with the privacy loss; the mean gradient norm "
        "does best.",
        _proxy_units,
        _proxies,
        _judge_proxies,
        _draw_proxies,
        note="*Highly* means above 0.5. The privacy loss is computed from the same "
        "gradient norms that *mean norm* averages, so a high correlation of these two "
        "is expected. Tests use up to 1,000 images drawn at random; *over all "
        "examples* and ρ in the picture use all images and every training by itself. "
        "The picture shows means of 30 bins of these drawn images, with a band of one "
        "standard deviation.",
    ),
    Figure(
        "fig3",
        "The hardest sets by privacy loss are farther and slower to unlearn than those "
        "by C-Proxy, mean norm or EL2N.",
        _hardest_units,
        _hardest_result,
        _judge_hardest,
        _draw_hardest,
        note="Four sets against four have 70 divisions, so no p-value over sets is "
        "below 1/70 = 0.0143. After the correction for 12 parts the claim cannot be "
        "refuted by this figure. The same images are in sets of several scores. The "
        "picture shows the area under the gap, which mixes *farther* and *slower* and "
        "is not tested; its axes do not start at 0.",
    ),
]
