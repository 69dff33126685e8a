"""How many steps until logistic regression has provably forgotten some points?

    python -m benchmarks.certified_logistic                   # digits, a minute
    python -m benchmarks.certified_logistic --data-root DIR   # and UCI Adult in DIR

Claim under test: with constants that are public, unlearning S points to
(ε, δ) = (1, 1e-5) by projected noisy gradient descent needs far fewer steps by this
library's bounds than by published ones, at the accuracy of retraining.

Training, unlearning and retraining are w ← Π(w − η∇f(w) + √(2η)σ·N(0, I)) on the full
batch, with f(w) = (1/n)Σ ln(1 + exp(−y·xᵀw)) + (λ/2)‖w‖². The denominator n stays the
same when points are removed. Nothing depends on the rows: each row is encoded and
scaled to norm 1 by a rule that looks at it alone, so the smoothness is at most 1/4 + λ
whatever the data, and η is its inverse. The number of steps is computed with these
bounds:

shifted             certified in both directions, compared with retraining for T + k
                    steps; for any S points, and for the chosen set
hyper-contractive   certified in one direction, compared with the same retraining
Corollary 4.4       with the same loss at order 4α and the rate of Chien et al.,
                    compared with retraining for T steps
Chien et al.        with their own learning bound for replaced points, as published
                    (Mironov's conversion) and with a better conversion

Results: OUT/certified_logistic.json, .md and .png.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.certified_steps import (
    EPSILON,
    ORDERS,
    Phase,
    Problem,
    Setting,
    our_steps,
    published_steps,
)
from benchmarks.common.binary_data import Array, adult, digits_3_8
from benchmarks.common.command_line import parser_of
from benchmarks.common.report import environment, write_json
from opacus_pi.accounting.conversion import gaussian_epsilon
from opacus_pi.accounting.guarantee import (
    Assumption,
    EpsilonDelta,
    Guarantee,
    derived,
    guarantee_of_run,
    observed,
)

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


def guarantee(
    problem: Problem, forget: Array, trained: Phase, unlearned: Phase
) -> Guarantee:
    """Return what may be claimed about any set of this size after two recorded runs.

    Each assumption is compared with what the runs did, or follows from it. What no run
    can show is declared.
    """
    total, k = trained.num_steps, unlearned.num_steps
    mu2 = problem.mu_squared(problem.shift(None, len(forget)), k)
    return guarantee_of_run(
        f"{k} noisy gradient steps after {total} of learning; retraining takes "
        f"{total + k}",
        (*_seen(problem, forget, trained, unlearned), *_proven(problem), *_DECLARED),
        orders=ORDERS[::20],
        divergences=ORDERS[::20] * mu2 / 2,
        reverse_divergences=ORDERS[::20] * mu2 / 2,
        statements=(
            EpsilonDelta(
                float(gaussian_epsilon(math.sqrt(mu2), problem.delta)),
                problem.delta,
                f"the shift of {math.sqrt(mu2):.3g} standard deviations",
                both_directions=True,
            ),
        ),
    )


def _seen(
    problem: Problem, forget: Array, trained: Phase, unlearned: Phase
) -> tuple[Assumption, ...]:
    """Return the assumptions that the two runs show, met or not."""
    runs, process = (trained, unlearned), problem.process
    left = trained.rows.copy()
    left[forget] = False
    longest = max(run.longest_row for run in runs)
    noise = {run.noise_std for run in runs}
    rates = {run.learning_rate for run in runs}
    divided = {run.denominator for run in runs}
    return (
        observed(
            "Training starts at weights that do not depend on the data",
            "it started at 0",
            met=not trained.start.any() and trained.num_steps > 0,
        ),
        observed(
            "Unlearning starts at the trained weights, and uses all rows but the set",
            f"{unlearned.rows.sum()} of {trained.rows.sum()} rows",
            met=np.array_equal(unlearned.start, trained.end)
            and np.array_equal(unlearned.rows, left),
        ),
        observed(
            "No row is longer than 1, and all sums are divided by n",
            f"longest row {longest:.12g}, divided by {problem.size}",
            met=longest <= 1 and divided == {problem.size},
        ),
        observed(
            f"Every step adds N(0, {process.noise_variance:.3g} I) to the weights",
            f"standard deviation {max(noise):.6g}, learning rate {max(rates):.6g}",
            met=noise == {math.sqrt(process.noise_variance)}
            and rates == {process.learning_rate},
        ),
    )


def _proven(problem: Problem) -> tuple[Assumption, ...]:
    """Return the assumptions that follow from rows of norm 1."""
    process = problem.process
    return (
        derived(
            "Every step is one full-batch gradient step, which contracts",
            f"c = {process.lipschitz:.6g} from smoothness 1/4 + λ and convexity λ",
        ),
        derived(
            "No set of this size moves a step further than the bound used",
            f"a row has gradient norm at most 1, so η/n = {process.learning_rate:.3g}"
            f"/{problem.size} for each",
        ),
    )


_DECLARED = (
    Assumption(
        "n, the settings and the encoding of a row are public",
        True,
        "they were chosen without looking at the rows, which no run can show",
    ),
    Assumption(
        "only the unlearned weights are released",
        True,
        "the bound is about them, not about earlier weights",
    ),
    Assumption(
        "the noise is Gaussian",
        True,
        "pseudo-random numbers in float64 stand for it",
    ),
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
        for seed, first in enumerate(trained):
            rng = np.random.default_rng([seed, size])
            unlearned = problem.descend(first.end, keep, k, rng)
            again = problem.descend(np.zeros(dims), keep, total, rng)
            for name, phase in zip(scores, (first, unlearned, again), strict=True):
                scores[name].append(problem.accuracy(phase.end))
        claim = guarantee(problem, forget, trained[-1], unlearned)
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
            "declared": [a.statement for a in claim.declarations],
            "epsilon": claim.epsilon(problem.delta),
            "reverse_epsilon": claim.reverse_epsilon(problem.delta),
        }


def markdown(rows: list[dict], num_seeds: int) -> str:
    """Return the table as a page."""
    heads = ("data", "n", "S", *METHODS, "retraining")
    heads += ("trained", "unlearned", "retrained", "kind")
    lines = [
        "# Certified unlearning of logistic regression",
        "",
        "Made by `python -m benchmarks.certified_logistic`; its `--help` explains the "
        "bounds. First the steps until ε ≤ 1 at δ = 1e-5, then test accuracy in % "
        f"(mean ± standard deviation of {num_seeds} seeds). The unlearned model has "
        "made as many unlearning steps as the column *shifted* requires, which holds "
        "for any set of S rows. *Kind* is that of its guarantee, which holds in both "
        "directions; it lists what is declared: the settings and the encoding of a row "
        "are public, only the unlearned weights are released, and pseudo-random "
        "numbers stand for Gaussian noise.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" + "|--:" * (len(heads) - 1) + "|",
    ]
    for row in rows:
        steps = [row["steps"][name] for name in (*METHODS, "retraining")]
        scores = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in row["accuracy"].values()]
        cells = [row["data"], row["num_examples"], row["num_points"], *steps, *scores]
        cells.append(row["kind"])
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
            "delta": {data.name: setting.delta for data, setting in settings},
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
