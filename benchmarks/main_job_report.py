"""What the main job prints and draws: strata, the order of their times, epsilons.

The strata of all seeds are ranked by their times to unlearn. Five strata are few: if
only the hardest one takes longer, a random order does as well in one case of five,
however many seeds agree. So the test and the interval are those of ``judging.ranks``,
whose unit is the stratum.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from benchmarks.common.report import environment, write_json
from benchmarks.reproduce.judging.ranks import rank_test
from opacus_pi.plotting import plot_curves, plot_epsilons

_ENDS = {"easiest": 0, "hardest": -1}  # places of two strata
_LEGEND = """\
UA: share of the forget set that is misclassified. MIA: share of the forget set that a
membership attack takes for unseen data. TA: test accuracy. Oracle: the mean of models
retrained without the forget set. Epochs by UA or loss: epochs of unlearning until this
metric is near the oracle's. Each cell: mean ± standard deviation over seeds."""


def order_of_times(times: np.ndarray) -> dict[str, Any]:
    """Return whether harder strata take longer: Spearman's rho, interval and p-value.

    Args:
        times: Time to unlearn, ``(seeds, strata)``, easiest stratum first; ``inf``
            (never) ranks above every finite time. At least two seeds.

    Returns:
        The fields of an ``Effect`` (correlation of the stratum's place with the mean
        rank of its times); ``text``, the same in words; ``tied_pairs``, the share of
        pairs of strata with equal times; ``at_once``, the share of times that are 0.
    """
    places, ranks = np.arange(times.shape[1]), stats.rankdata(times, axis=1)
    effect = rank_test(places, ranks).effect("Spearman's ρ")
    first, second = np.triu_indices(times.shape[1], 1)
    return effect.to_json() | {
        "text": effect.text(),
        "tied_pairs": float((times[:, first] == times[:, second]).mean()),
        "at_once": float((times == 0).mean()),
    }


def draw_figure(results: list[dict], path: Path) -> None:
    """Draw the epsilons of one run, and the gaps of the easiest and hardest set.

    Args:
        results: One dict per seed, as ``results.json`` has them.
        path: Name of the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    privacy = results[0]["privacy"]
    shown = privacy["shown"]
    plot_epsilons(
        shown["epsilons"],
        privacy["worst_case_epsilon"],
        shown["epsilon_limits"],
        ax=left,
    )
    left.set_title("Privacy of each example", fontsize="medium")
    gaps = {f"{name} examples": _gaps(results, i) for name, i in _ENDS.items()}
    epochs = np.arange(next(iter(gaps.values())).shape[1])
    plot_curves(epochs, gaps, metric="gap in accuracy, points", ax=right)
    right.set_ylim(0, None)
    right.set_xlabel("epochs of unlearning")
    right.set_title(
        "Gap to retrained models while examples are forgotten", fontsize="medium"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _gaps(results: list[dict], stratum: int) -> np.ndarray:
    """Return the gap of unlearning accuracy to the oracles, in points.

    Returns:
        ``(seeds, evaluations)``, at least 0.
    """
    metric = "unlearning_accuracy"
    rows = [one["strata"][stratum] for one in results]
    gaps = [
        np.array(row["trace"][metric]) - np.mean(row["oracle"][metric]) for row in rows
    ]
    return 100 * np.abs(np.array(gaps))


def publish(results: list[dict], settings: dict, out: Path) -> None:
    """Print the tables and write ``results.json`` and ``figure.png``."""
    columns = _columns(results)
    names = [row["stratum"] for row in results[0]["strata"]]
    print(_table(names, columns))
    print(_LEGEND)
    times = {
        "accuracy": columns["epochs by UA"],
        "loss": columns["epochs by loss"],
    }
    correlations = {name: order_of_times(values) for name, values in times.items()}
    for name, found in correlations.items():
        print(_sentence(name, found))
    print(_privacy(results, settings["delta"]))
    draw_figure(results, out / "figure.png")
    content = {"settings": settings, "environment": environment()}
    content |= {"rank_correlation": correlations, "seeds": results}
    write_json(out / "results.json", content)
    print(f"wrote {out / 'results.json'} and {out / 'figure.png'}")


def _columns(results: list[dict]) -> dict[str, np.ndarray]:
    """Return the columns of the table, each ``(seeds, strata)``."""

    def column(value: Any) -> np.ndarray:
        return np.array([[value(row) for row in one["strata"]] for one in results])

    def moment(metric: str, when: int) -> np.ndarray:
        return column(lambda row: row["trace"][metric][when])

    def oracle(metric: str) -> np.ndarray:
        return column(lambda row: np.mean(row["oracle"][metric]))

    return {
        "mean loss": column(lambda row: row["mean_loss"]),
        "percentile": column(lambda row: row["percentile"]),
        "UA before": moment("unlearning_accuracy", 0),
        "UA after": moment("unlearning_accuracy", -1),
        "UA oracle": oracle("unlearning_accuracy"),
        "loss before": moment("forget_loss", 0),
        "loss after": moment("forget_loss", -1),
        "loss oracle": oracle("forget_loss"),
        "MIA after": moment("membership_inference", -1),
        "MIA oracle": oracle("membership_inference"),
        "epochs by UA": column(lambda row: row["times"]["unlearning_accuracy"]),
        "epochs by loss": column(lambda row: row["times"]["forget_loss"]),
        "TA after": moment("test_accuracy", -1),
        "TA oracle": oracle("test_accuracy"),
    }


def _table(names: list[str], columns: dict[str, np.ndarray]) -> str:
    """Return a line per stratum: mean ± standard deviation over seeds."""
    header = ["stratum", *columns]
    lines = [header]
    for j, name in enumerate(names):
        lines.append([name, *(_cell(values[:, j]) for values in columns.values())])
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    rows = (
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(rows)


def _cell(values: np.ndarray) -> str:
    """Return mean ± standard deviation; count the runs that never got there."""
    finite = values[np.isfinite(values)]
    never = len(values) - len(finite)
    if not len(finite):
        return f"never ×{never}"
    spread = finite.std(ddof=1) if np.ptp(finite) > 1e-12 * abs(finite).max() else 0.0
    text = f"{finite.mean():.3g}±{spread:.2g}"
    return f"{text}, never ×{never}" if never else text


def _sentence(name: str, found: dict[str, Any]) -> str:
    """Describe the order of the times."""
    tied, at_once = (f"{100 * found[key]:.0f} %" for key in ("tied_pairs", "at_once"))
    return (
        f"Do harder strata take longer to forget, by {name}? {found['text']}. "
        f"{tied} of the pairs of strata took equally long; {at_once} of the models "
        "were near the oracles before unlearning began (0 epochs)."
    )


def _privacy(results: list[dict], delta: float) -> str:
    """Describe the DP-SGD run."""
    runs = [one["privacy"] for one in results]
    low, tenth, middle, ninth, high = np.mean([r["epsilon_quantiles"] for r in runs], 0)
    worst = np.mean([r["worst_case_epsilon"] for r in runs])
    accuracy = np.mean([r["test_accuracy"] for r in runs])
    return (
        f"DP-SGD on the same data: test accuracy {accuracy:.3f}; at δ = {delta:g} the "
        f"worst case is ε = {worst:.2f}; ε of single examples: smallest {low:.2f}, "
        f"10 % {tenth:.2f}, median {middle:.2f}, 90 % {ninth:.2f}, largest {high:.2f}."
    )
