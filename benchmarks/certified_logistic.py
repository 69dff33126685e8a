"""How many steps until logistic regression has provably forgotten some points?

    python -m benchmarks.certified_logistic                   # digits, a minute
    python -m benchmarks.certified_logistic --data-root DIR   # and UCI Adult in DIR

Claim under test: with every constant computed from the data, unlearning S points to
(ε, δ) = (1, 1/n) by projected noisy gradient descent needs far fewer steps by this
library's bounds than by published ones, at the accuracy of retraining.

Training, unlearning and retraining are w ← Π(w − η∇f(w) + √(2η)σ·N(0, I)) on the full
batch, with f(w) = (1/n)Σ ln(1 + exp(−y·xᵀw)) + (λ/2)‖w‖². The denominator n stays the
same when points are removed. The number of steps is computed with these bounds:

shifted             certified in both directions, compared with retraining for T + k
                    steps; for any S points, and for the chosen set
hyper-contractive   certified in one direction, compared with the same retraining
Corollary 4.4       with the same loss at order 4α and the rate of Chien et al.,
                    compared with retraining for T steps
Chien et al.        with their own learning bound for replaced points, as published
                    (Mironov's conversion) and with a better conversion

Results: OUT/certified_logistic.json, .md and .png.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.certified_steps import (
    EPSILON,
    ORDERS,
    Problem,
    Setting,
    our_steps,
    published_steps,
)
from benchmarks.common.binary_data import Array, adult, digits_3_8
from benchmarks.common.command_line import parser_of
from benchmarks.common.report import environment, write_json
from opacus_pi.accounting.guarantee import Assumption, Guarantee

ROOT = Path(__file__).parents[1]
SIZES = (1, 10, 100, 1000)
METHODS = (
    "shifted",
    "shifted, this set",
    "hyper-contractive",
    "Corollary 4.4",
    "Chien et al.",
    "Chien et al., better conversion",
)


def guarantee(problem: Problem, forget: Array, k: int) -> Guarantee:
    """Return what may be claimed after k steps; every constant was computed."""
    process, total = problem.process, problem.setting.num_steps
    mu2 = problem.mu_squared(problem.shift(forget, len(forget)), k)
    facts = (
        (
            "Every step is one full-batch gradient step, which contracts",
            f"c = {process.lipschitz:.6g} from the data's spectrum",
        ),
        (
            "The forget set moves no step further than the bound used",
            "row norms and their Gram matrix",
        ),
        (
            f"Every step adds N(0, {process.noise_variance:.3g} I) to the weights",
            "training and unlearning were run with it (pseudo-random, in float64)",
        ),
        ("The start does not depend on the data", "training starts at 0"),
    )
    return Guarantee(
        f"{k} noisy gradient steps after {total} of learning; retraining takes "
        f"{total + k}",
        tuple(Assumption(text, True, evidence) for text, evidence in facts),
        orders=tuple(ORDERS[::20]),
        divergences=tuple(ORDERS[::20] * mu2 / 2),
    )


def run(problem: Problem, num_seeds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per size of the forget set: steps, accuracies and ε."""
    total, dims = problem.setting.num_steps, problem.signed.shape[1]
    everyone = np.ones(problem.size, dtype=bool)
    trained = [
        problem.descend(np.zeros(dims), everyone, total, np.random.default_rng(seed))
        for seed in range(num_seeds)
    ]
    for size in (s for s in SIZES if s < problem.size / 2):
        forget = np.random.default_rng(size).choice(problem.size, size, replace=False)
        keep = everyone.copy()
        keep[forget] = False
        steps = our_steps(problem, forget, size) | published_steps(problem, size)
        k = int(steps["shifted"])
        scores = {"trained": [], "unlearned": [], "retrained": []}
        for seed, w in enumerate(trained):
            rng = np.random.default_rng([seed, size])
            unlearned = problem.descend(w, keep, k, rng)
            again = problem.descend(np.zeros(dims), keep, total, rng)
            for name, weights in zip(scores, (w, unlearned, again), strict=True):
                scores[name].append(problem.accuracy(weights))
        claim = guarantee(problem, forget, k)
        yield {
            "data": problem.data.name,
            "num_points": size,
            "num_examples": problem.size,
            "steps": steps | {"retraining": total},
            "accuracy": {
                name: [float(np.mean(v)), float(np.std(v))]
                for name, v in scores.items()
            },
            "kind": claim.kind,
            "epsilon": claim.epsilon(problem.delta),
        }


def markdown(rows: list[dict], num_seeds: int) -> str:
    """Return the table as a page."""
    heads = ("data", "n", "S", *METHODS, "retraining")
    heads += ("trained", "unlearned", "retrained")
    lines = [
        "# Certified unlearning of logistic regression",
        "",
        "Made by `python -m benchmarks.certified_logistic`; its `--help` explains the "
        "bounds. First the steps until ε ≤ 1 at δ = 1/n, then test accuracy in % (mean "
        f"± standard deviation of {num_seeds} seeds). The unlearned model has made as "
        "many unlearning steps as the column *shifted* requires.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" + "|--:" * (len(heads) - 1) + "|",
    ]
    for row in rows:
        steps = [row["steps"][name] for name in (*METHODS, "retraining")]
        scores = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in row["accuracy"].values()]
        cells = [row["data"], row["num_examples"], row["num_points"], *steps, *scores]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict], path: Path) -> None:
    """Draw the steps against the number of points, one panel per data set."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["data"] for row in rows))
    fig, axes = plt.subplots(
        1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        chosen = [row for row in rows if row["data"] == name]
        sizes = [row["num_points"] for row in chosen]
        for method in METHODS:
            counts = [max(row["steps"][method], 0.5) for row in chosen]
            ax.plot(sizes, counts, marker="o", markersize=4, label=method)
        retraining = chosen[0]["steps"]["retraining"]
        ax.axhline(retraining, color="black", linestyle="--", label="retraining")
        ax.set(xscale="log", yscale="log", xlabel="points to forget", title=name)
    axes[0][0].set_ylabel("certified steps (0 drawn at 0.5)")
    axes[0][-1].legend(fontsize=7)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    """Parse the command line, run all data sets, and write the results."""
    parser = parser_of("benchmarks.certified_logistic", __doc__)
    parser.add_argument("--data-root", type=Path, help="folder with UCI Adult's files")
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    settings = [(digits_3_8(), Setting(0.01, 0.03, 500))]
    if args.data_root is not None:
        settings.append((adult(args.data_root), Setting(1e-3, 0.01, 3000)))
    rows = [
        row
        for data, setting in settings
        for row in run(Problem(data, setting), args.num_seeds)
    ]
    page = markdown(rows, args.num_seeds)
    write_json(
        args.out / "certified_logistic.json",
        {
            "epsilon": EPSILON,
            "delta": "1/n",
            "settings": {data.name: asdict(setting) for data, setting in settings},
            "rows": rows,
            "environment": environment(),
        },
    )
    (args.out / "certified_logistic.md").write_text(page, encoding="utf-8")
    figure(rows, args.out / "certified_logistic.png")
    print(page)


if __name__ == "__main__":
    main()
