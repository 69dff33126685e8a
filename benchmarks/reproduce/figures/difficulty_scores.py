"""Scores of difficulty beside the privacy loss: figures 2 and 3.

Claim of figure 2: the five proxies of section 5.3 correlate highly with the privacy
loss, the mean gradient norm best. Claim of figure 3: the hardest sets by privacy loss
take longer to unlearn than those by three of the proxies, at several sizes.

Data: all training images of the scale's main experiment. Seeds: figure 2 uses
Spearman's ρ of each seed's own ledger, with intervals over seeds (its picture shows
means over the ledgers). Figure 3 uses ``num_seeds`` trainings; each set is unlearned
once per seed, sets are ranked by means over all ledgers, and oracles are shared.
Settings: proxies are computed from the rows of the ledger (the paper has mean norm and
confidence at every epoch); fine-tuning as in figure 1 (middle). If no run reaches the
oracle within its epochs, the remaining distances are compared.
"""

from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import AutoLocator

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.verdicts import (
    Verdict,
    all_of,
    combined,
    of_interval,
    text_of,
)
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import ProxyRanks, Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval
from opacus_pi.plotting import plot_hardest_sets, plot_proxies

LOSS, BEST = "privacy loss", "mean norm"
HIGH = 0.5  # Spearman's rho above this is called high
DRAWN = 1_000  # examples in the picture; correlations use all examples
HARDEST_BY = (LOSS, "C-Proxy", "mean norm", "EL2N")


def _proxy_units(scale: Scale) -> list[ProxyRanks]:
    return [ProxyRanks(scale.sgd, seed) for seed in range(scale.sgd.num_seeds)]


def _proxies(scale: Scale, workspace: Workspace) -> Result:
    scores = workspace.scores(scale.sgd)
    runs = [unit.run(workspace) for unit in _proxy_units(scale)]
    shown = np.random.default_rng(0).permutation(len(scores[LOSS]))[:DRAWN]
    return {
        "rho": {name: [run[name] for run in runs] for name in runs[0]},
        "drawn": {
            name: outcomes.rounded_to_json(v[shown]) for name, v in scores.items()
        },
    }


def _judge_proxies(result: Result) -> Verdict:
    """Decide, by seed, whether every rho is high and the mean norm's the highest."""
    rho = {name: np.array(values) for name, values in result["rho"].items()}
    found = {name: mean_interval(values) for name, values in rho.items()}
    high = all_of([of_interval(i.low - HIGH, i.high - HIGH) for i in found.values()])
    best = rho.pop(BEST)
    ahead = {name: mean_interval(best - values) for name, values in rho.items()}
    first = all_of([of_interval(i.low, i.high) for i in ahead.values()])
    next_best = min(ahead, key=lambda name: ahead[name].estimate)
    numbers = "Spearman with the privacy loss: "
    numbers += ", ".join(f"{name} {text_of(i)}" for name, i in found.items())
    lead = (
        f"Spearman of {BEST} exceeds that of {next_best} by "
        f"{text_of(ahead[next_best])}, n = {len(best)}"
    )
    return combined(
        {
            "high correlation": Verdict(high, numbers),
            f"{BEST} best": Verdict(first, lead),
        }
    )


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


def _hardest(scale: Scale, score: str) -> list[ForgetSet]:
    return [ForgetSet("top", size, score) for size in scale.hardest_sizes]


def _hardest_units(scale: Scale) -> list[Unit]:
    return [
        unit
        for score in HARDEST_BY
        for unit in outcomes.unlearnings(scale.sgd, _hardest(scale, score), "fine-tune")
    ]


def _hardest_result(scale: Scale, workspace: Workspace) -> Result:
    def of_all(measure: Callable[..., np.ndarray]) -> dict[str, dict[str, list]]:
        return {
            name: {
                score: outcomes.to_json(
                    measure(
                        workspace,
                        scale.sgd,
                        _hardest(scale, score),
                        "fine-tune",
                        metric,
                    )
                )
                for score in HARDEST_BY
            }
            for name, metric in outcomes.METRICS.items()
        }

    return {
        "sizes": list(scale.hardest_sizes),
        "times": of_all(outcomes.times),
        "gaps": of_all(outcomes.gaps),
        "max_time": scale.sgd.unlearn_epochs,
    }


def _judge_hardest(result: Result) -> Verdict:
    """Compare the privacy loss's sets with each other score's, means over sizes."""
    found = {}
    for metric, times in result["times"].items():
        gaps = {name: np.array(rows) for name, rows in result["gaps"][metric].items()}
        arrays = {name: outcomes.from_json(rows) for name, rows in times.items()}
        for score in HARDEST_BY[1:]:
            name = f"{metric}, {LOSS} - {score}"
            found[name] = _longer(arrays, gaps, score, result["max_time"])
    return combined(found)


def _longer(
    times: Mapping[str, np.ndarray],
    gaps: Mapping[str, np.ndarray],
    score: str,
    max_time: float,
) -> Verdict:
    """Compare times, or the remaining gaps if no run reached the oracle."""

    def more(values: Mapping[str, np.ndarray]) -> ConfidenceInterval:
        return mean_interval(values[LOSS].mean(1) - values[score].mean(1))

    longer = more({name: np.minimum(t, max_time) for name, t in times.items()})
    further = more(gaps)
    left = f"remaining gap larger by {text_of(further)}, n = {len(gaps[LOSS])}"
    if np.isinf([times[LOSS], times[score]]).all():
        verdict = of_interval(further.low, further.high)
        return Verdict(
            verdict, f"no run reached the oracle in {max_time} epochs; {left}"
        )
    verdict = of_interval(longer.low, longer.high)
    return Verdict(verdict, f"longer by {text_of(longer, 2)} epochs; {left}")


def _draw_hardest(result: Result) -> Picture:
    """Draw the times above, and the remaining gaps to the oracle below."""
    picture, axes = plt.subplots(
        2, len(outcomes.METRICS), figsize=(8.4, 6.6), layout="constrained"
    )
    sizes, most = result["sizes"], result["max_time"]
    for (above, below), metric in zip(axes.T, outcomes.METRICS, strict=True):
        for ax, kind in ((above, "times"), (below, "gaps")):
            rows = result[kind][metric].items()
            arrays = {score: outcomes.from_json(values) for score, values in rows}
            plot_hardest_sets(sizes, arrays, max_time=most, ax=ax)
        above.set_title(f"by {metric}", fontsize="medium")
        below.yaxis.set_major_locator(AutoLocator())
        below.set_ylabel(f"|{metric} - oracle's| after {most} epochs")
        below.get_legend().remove()
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
    ),
    Figure(
        "fig3",
        "The hardest sets by privacy loss take longer to unlearn than those by "
        "C-Proxy, mean norm or EL2N.",
        _hardest_units,
        _hardest_result,
        _judge_hardest,
        _draw_hardest,
    ),
]
