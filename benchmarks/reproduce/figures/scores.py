"""Scores of difficulty beside the privacy loss: figures 2 and 3.

Figure 2: the five proxies of section 5.3 against the privacy loss, over all examples
(expectations over the seeds' ledgers). Figure 3: the hardest sets by four scores, of
several sizes, unlearned by fine-tuning; which score finds the sets that take longest?
Where no run arrives within the epochs given, what is left of the way is compared.
"""

from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.figures import outcomes
from benchmarks.reproduce.figures.figure import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    Figure,
    Result,
    Verdict,
    joined,
    of_interval,
)
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit, trainings
from opacus_pi.correlations import rank_correlations
from opacus_pi.evaluation.intervals import Interval, mean_interval
from opacus_pi.plotting import plot_hardest_sets, plot_proxies

LOSS = "privacy loss"
DRAWN = 1_000  # examples in the picture; the correlations are over all
HARDEST_BY = (LOSS, "C-Proxy", "mean norm", "EL2N")


def _proxies(scale: Scale, lab: Lab) -> Result:
    scores = lab.scores(scale.sgd)
    ranks = rank_correlations(scores)
    shown = np.random.default_rng(0).permutation(len(scores[LOSS]))[:DRAWN]
    return {
        "rho": {n: ranks.between(n, LOSS).tolist() for n in scores if n != LOSS},
        "drawn": {name: outcomes.rounded(v[shown]) for name, v in scores.items()},
    }


def _judge_proxies(result: Result) -> Verdict:
    rho = result["rho"]
    because = ", ".join(f"{name} {v[0]:.2f}" for name, v in rho.items())
    high = all(low > 0.5 for _, low, _ in rho.values())
    best = max(rho, key=lambda name: rho[name][0]) == "mean norm"
    verdict = BORNE_OUT if high and best else NOT_BORNE_OUT
    return Verdict(verdict, f"Spearman with the privacy loss: {because}")


def _draw_proxies(result: Result) -> Picture:
    scores = {name: np.array(values) for name, values in result["drawn"].items()}
    losses = scores.pop(LOSS)
    bins = min(30, len(losses) // 5)
    return plot_proxies(losses, scores, num_bins=bins).figure


def _hardest(scale: Scale, score: str) -> list[ForgetSet]:
    return [ForgetSet("top", size, score) for size in scale.hardest_sizes]


def _hardest_units(scale: Scale) -> list[Unit]:
    return [
        unit
        for score in HARDEST_BY
        for unit in outcomes.unlearnings(scale.sgd, _hardest(scale, score), "fine-tune")
    ]


def _hardest_result(scale: Scale, lab: Lab) -> Result:
    def of_all(measure: Callable[..., np.ndarray]) -> dict[str, dict[str, list]]:
        return {
            name: {
                score: outcomes.listed(
                    measure(lab, scale.sgd, _hardest(scale, score), "fine-tune", metric)
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
    """Mean over sizes, by seed: the privacy loss's sets against each other score's."""
    found = {}
    for metric, times in result["times"].items():
        gaps = {name: np.array(rows) for name, rows in result["gaps"][metric].items()}
        arrays = {name: outcomes.array(rows) for name, rows in times.items()}
        for score in HARDEST_BY[1:]:
            name = f"{metric}, {LOSS} - {score}"
            found[name] = _longer(arrays, gaps, score, result["max_time"])
    return joined(found)


def _longer(
    times: Mapping[str, np.ndarray],
    gaps: Mapping[str, np.ndarray],
    score: str,
    max_time: float,
) -> Verdict:
    """By the times, or by the gaps left where no run arrived in time."""

    def more(values: Mapping[str, np.ndarray]) -> Interval:
        return mean_interval(values[LOSS].mean(1) - values[score].mean(1))

    longer = more({name: np.minimum(t, max_time) for name, t in times.items()})
    further = more(gaps)
    left = f"gap left {further.estimate:.3f} [{further.low:.3f}, {further.high:.3f}]"
    if np.isinf([times[LOSS], times[score]]).all():
        verdict = of_interval(further.low, further.high)
        return Verdict(verdict, f"no run arrived in {max_time} epochs; {left}")
    time = f"{longer.estimate:.2f} epochs [{longer.low:.2f}, {longer.high:.2f}]"
    return Verdict(of_interval(longer.low, longer.high), f"{time}, {left}")


def _draw_hardest(result: Result) -> Picture:
    picture, axes = plt.subplots(
        1, len(outcomes.METRICS), figsize=(8.4, 3.6), layout="constrained"
    )
    for ax, (metric, times) in zip(axes, result["times"].items(), strict=True):
        arrays = {score: outcomes.array(t) for score, t in times.items()}
        most = result["max_time"]
        plot_hardest_sets(result["sizes"], arrays, max_time=most, ax=ax)
        ax.set_title(f"by {metric}", fontsize="medium")
    return picture


FIGURES = [
    Figure(
        "fig2",
        "All proxies correlate highly with the privacy loss; the mean gradient norm "
        "does best.",
        lambda scale: list(trainings(scale.sgd)),
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
