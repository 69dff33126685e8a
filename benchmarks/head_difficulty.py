"""Does the privacy loss of a recorded run rank examples as the exact ε does?

    python -m benchmarks.head_difficulty     # digits, minutes
    python -m benchmarks.head_difficulty --sets cifar10 --data-root DIR

A ridge head has an exact ε for every example (``unlearning.heads``). The rows are
pixels of digits, or what a small network sees in images of CIFAR-10; it was trained on
40,000 other images. A seed trains a head on its own random rows. The exact ε before
unlearning is compared with

exact steps        unlearning steps until the exact ε is at most 1
our bound          ``contractive_divergence``, from the residuals along simulated runs
recorded loss      ``privacy_losses`` of the same noisy gradient descent, recorded by
                   ``PrivacyEngine.make_monitored``
DP-SGD loss        ``privacy_losses`` of a softmax layer on the same rows, trained by
                   DP-SGD with Poisson batches and clipping
gradient norm      of the example at the ridge solution, the simplest proxy
with leverage      the residual times the root of xᵀH⁻¹x, instead of the norm of x
simulated steps    the first of a grid of steps at which a test on the example's loss
                   does not tell unlearned from retrained weights: AUC at most 0.55
                   (rows that need more than the largest of the grid count as equal)

Results: OUT/head_difficulty.json and .md, rank correlations with the exact ε; FIGURE.
The file is written after every seed, and stored seeds are not run again.
"""

import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.command_line import parser_of
from benchmarks.common.head_data import (
    NUM_CLASSES,
    Array,
    HeadData,
    digits,
    network_features,
)
from benchmarks.common.report import markdown as table_of
from benchmarks.common.seeds import publish, run_missing
from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.accounting import contractive_divergence, lsi_track, privacy_losses
from opacus_pi.unlearning.heads import RidgeHead
from opacus_pi.unlearning.heads.ridge_laws import decay

ROOT = Path(__file__).parents[1]
DELTA, EPSILON, ORDER = 1e-5, 1.0, 8.0
SETTINGS = {"regularisation": 0.01, "num_steps": 300, "noise_std": 3e-3}
NUM_RUNS = 16
GRID = (0, 5, 10, 20, 30, 40, 60, 80, 100, 130, 160, 200, 250, 300, 400, 500)
FIGURE, STORED = "head_difficulty.png", "head_difficulty.json"
SAMPLES, AUC = 4000, 0.55
NAMES = (
    "exact steps",
    "our bound",
    "recorded loss",
    "DP-SGD loss",
    "gradient norm",
    "with leverage",
    "simulated steps",
)


@dataclass(frozen=True)
class Case:
    """What is measured of one data set.

    Attributes:
        title: Its name, for tables.
        num_rows: Rows of the head, drawn anew for every seed.
        num_simulated: Rows of which unlearning is simulated.
    """

    title: str
    num_rows: int
    num_simulated: int


CASES = {
    "digits": Case("digits", num_rows=500, num_simulated=60),
    "cifar10": Case("CIFAR-10", num_rows=300, num_simulated=30),
}


@cache
def rows_of(name: str, data_root: Path | None) -> HeadData:
    """Return the rows that the heads of all seeds are drawn from.

    Args:
        name: One of ``CASES``.
        data_root: Folder of torchvision's data sets; not needed for digits.

    Raises:
        ValueError: If images are needed and no folder was given.
    """
    if name == "digits":
        return digits()
    if data_root is None:
        raise ValueError(f"{name} needs --data-root DIR, the folder of torchvision.")
    return network_features(name, data_root, num_train=10_000)


def measured(case: Case, data: HeadData, seed: int) -> dict[str, Array]:
    """Return every score of every example, for one seed."""
    rng = np.random.default_rng(seed)
    rows, labels = data.train
    chosen = rng.choice(len(rows), case.num_rows, replace=False)
    rows, labels = rows[chosen], labels[chosen]
    head = RidgeHead(num_classes=NUM_CLASSES, seed=rng, **SETTINGS).fit(rows, labels)
    some = np.sort(rng.choice(case.num_rows, case.num_simulated, replace=False))
    steps = np.full(case.num_rows, np.nan)
    steps[some] = [simulated_steps(head, int(i), rng) for i in some]
    descent = head._compression().descent
    optimum = descent.basis @ descent.optimum
    residuals = np.linalg.norm(head._targets - rows @ optimum, axis=1)
    leverages = np.square(rows @ descent.basis) @ (head.learning_rate / descent.rates)
    pairs, _ = head._compression().pairs(rows, head._targets, head.num_steps, [0])
    return {
        "exact": head.epsilons(DELTA),
        "exact divergence": pairs[0].divergences(np.array([ORDER]))[0],
        "exact steps": head.steps_to(EPSILON, DELTA).astype(float),
        "our bound": bound(head, rng),
        "recorded loss": recorded_loss(head, labels, seed),
        "DP-SGD loss": private_loss(rows, labels, seed),
        "gradient norm": residuals * np.linalg.norm(rows, axis=1),
        "with leverage": residuals * np.sqrt(leverages),
        "simulated steps": steps,
    }


def bound(head: RidgeHead, rng: np.random.Generator) -> Array:
    """Return the contractive recursion on the gradient norms along simulated runs."""
    rows, targets = head._features, head._targets
    shifts = np.empty((head.num_steps, NUM_RUNS, len(rows)))
    scale = head.learning_rate * np.linalg.norm(rows, axis=1) / len(rows)
    for run in range(NUM_RUNS):
        weights = np.zeros_like(head.coef_)
        for t in range(head.num_steps):
            shifts[t, run] = scale * np.linalg.norm(targets - rows @ weights, axis=1)
            noise = rng.normal(scale=head.noise_std, size=weights.shape)
            weights = weights - head.learning_rate * head._gradient(weights) + noise
    contraction = 1 - head.learning_rate * head.regularisation
    shared = {"lipschitz": contraction, "noise_variance": head.noise_std**2}
    lsi = lsi_track(0.0, head.num_steps, **shared)
    power = 3.0 * head.num_steps
    found = contractive_divergence(shifts, ORDER, lsi=lsi, hoelder_p=power, **shared)
    return np.asarray(found)


def recorded_loss(head: RidgeHead, labels: np.ndarray, seed: int) -> Array:
    """Return the losses of the same descent, run by torch and recorded.

    The mean of MSELoss over ten outputs is a fifth of the head's loss.
    """
    torch.manual_seed(seed)
    targets = np.eye(NUM_CLASSES)[labels] - 1 / NUM_CLASSES
    data = TensorDataset(*map(torch.as_tensor, (head._features, targets)))
    model = nn.Linear(head._features.shape[1], NUM_CLASSES, bias=False).double()
    nn.init.zeros_(model.weight)
    rate, fifth = head.learning_rate, NUM_CLASSES / 2
    recorder = Recorder.evenly_spaced(60, num_steps=head.num_steps, mode="swept")
    engine = PrivacyEngine(accountant="rdp", recorder=recorder)
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(
            model.parameters(), rate * fifth, weight_decay=head.regularisation / fifth
        ),
        data_loader=DataLoader(data, batch_size=len(data)),
        noise_std=head.noise_std / (rate * fifth),
        criterion=nn.MSELoss(),
        poisson_sampling=False,
    )
    _train(model, optimizer, loader, nn.MSELoss(), head.num_steps)
    return privacy_losses(engine.ledger, ORDER)


def private_loss(rows: Array, labels: np.ndarray, seed: int) -> Array:
    """Return the losses of a softmax layer that is trained by DP-SGD."""
    torch.manual_seed(seed)
    data = TensorDataset(torch.as_tensor(rows).float(), torch.as_tensor(labels))
    model = nn.Linear(rows.shape[1], NUM_CLASSES, bias=False)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=2.0),
        data_loader=DataLoader(data, batch_size=len(data) // 10, shuffle=True),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    _train(model, optimizer, loader, nn.CrossEntropyLoss(), 20 * len(loader))
    return privacy_losses(engine.ledger, ORDER)


def _train(
    model: nn.Module, optimizer: Any, loader: Any, criterion: nn.Module, steps: int
) -> None:
    """Make a number of updates, passing over the loader as often as necessary."""
    done = 0
    while done < steps:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            done += 1


def simulated_steps(head: RidgeHead, index: int, rng: np.random.Generator) -> float:
    """Return the first steps of the grid at which the loss does not give it away.

    Only the outputs on the example are drawn: they are Gaussian, too.
    """
    gap = head._gap(np.array([index]))
    rates, x = gap.descent.rates, gap.descent.basis.T @ head._features[index]
    target = head._targets[index]
    for k in GRID:
        total, left = head.num_steps + k, decay(rates, k)
        kept = decay(rates, total)[:, None]
        mean = x @ (gap.descent.optimum - kept * gap.descent.optimum)
        variance = gap.descent.process.variances(rates, total) @ np.square(x)
        moved = mean + (x * left) @ gap.mean
        wider = variance + (x * left) @ gap.covariance @ (x * left)
        losses = [
            np.square(
                centre + np.sqrt(spread) * rng.normal(size=(SAMPLES, len(target)))
                - target
            ).sum(axis=1)
            for centre, spread in ((moved, wider), (mean, variance))
        ]  # fmt: skip
        ranks = rankdata(np.concatenate(losses))[:SAMPLES].mean()
        auc = (ranks - (SAMPLES + 1) / 2) / SAMPLES
        if max(auc, 1 - auc) <= AUC:
            return float(k)
    return float("inf")


def correlations(scores: dict[str, Array]) -> dict[str, float]:
    """Return Spearman's correlation of every score with the exact ε."""
    found = {}
    for name in NAMES:
        known = ~np.isnan(scores[name])
        rho = spearmanr(scores["exact"][known], rankdata(scores[name][known]))
        found[name] = float(rho.statistic)
    return found


def looseness(scores: dict[str, Array]) -> dict[str, list[float]]:
    """Return least and median ratio to the exact divergence at the same order."""
    exact = scores["exact divergence"]
    return {
        name: np.quantile(scores[name] / exact, [0, 0.5]).tolist()
        for name in ("our bound", "recorded loss")
    }


def result_of(scores: dict[str, Array]) -> dict[str, Any]:
    """Return what is stored of one seed.

    Args:
        scores: Of every example.
    """
    return {
        "correlations": correlations(scores),
        "looseness": looseness(scores),
        "exact quantiles": np.quantile(scores["exact"], [0, 0.5, 1]).tolist(),
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the tables of all data sets as a page."""
    sections = [
        _section(CASES[name], list(stored["seeds"].values()))
        for name, stored in found["cases"].items()
        if stored["seeds"]
    ]
    return (
        "# Exact difficulty of examples, and what predicts it\n\n"
        "Made by `python -m benchmarks.head_difficulty`; its `--help` explains the "
        f"scores. The exact ε is that before unlearning, at δ = {DELTA:g}. The tables "
        "have Spearman's correlation with it, mean ± standard deviation over seeds.\n\n"
        + "".join(sections)
        + _READING
    )


_READING = """## Reading

The bound and the recorded loss rank examples hardly better than the final gradient norm
does. What they miss is the direction of the row. A row in a direction that few others
share has a high leverage, and with the leverage instead of the norm the residual ranks
almost as the exact ε does.
"""


def _section(case: Case, seeds: list[dict[str, Any]]) -> str:
    """Return the part of the page about one data set."""
    rows: list[tuple[str, ...]] = [("score", "rank correlation", "least", "largest")]
    for name in NAMES:
        values = [one["correlations"][name] for one in seeds]
        spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
        rows.append((name, spread, f"{min(values):.3f}", f"{max(values):.3f}"))
    low, middle, high = np.mean([one["exact quantiles"] for one in seeds], axis=0)
    ratios = [
        np.mean([one["looseness"][name] for one in seeds], axis=0)
        for name in ("our bound", "recorded loss")
    ]
    return (
        f"## {case.title}\n\n{len(seeds)} seeds, {case.num_rows} rows each "
        f"({case.num_simulated} for simulated steps). The exact ε: smallest {low:.2g}, "
        f"median {middle:.2g}, largest {high:.2g}.\n\n"
        + table_of(rows)
        + f"\n\nAt order {ORDER:g} our bound is {ratios[0][1]:.1f} times the exact "
        f"divergence in the median and at least {ratios[0][0]:.1f} times; the recorded "
        f"loss {ratios[1][1]:.1f} and {ratios[1][0]:.1f} times.\n\n"
    )


def figure(scores: dict[str, Array], seeds: list[dict[str, Any]], path: Path) -> None:
    """Draw every score of one seed against the exact ε."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 4, figsize=(12, 6), layout="constrained", sharex=True)
    axes[1, 3].set_visible(False)
    for ax, name in zip(axes.flat, NAMES, strict=False):
        values = [one["correlations"][name] for one in seeds]
        ax.plot(scores["exact"], scores[name], "o", markersize=2.5, alpha=0.6)
        ax.set(ylabel=name, yscale="log" if "steps" not in name else "linear")
        ax.set_title(
            f"rank correlation {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}",
            fontsize="medium",
        )
    for ax in axes[-1]:
        ax.set_xlabel(f"exact ε at δ = {DELTA:g}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    """Parse the command line, run the missing seeds, and write the results."""
    parser = parser_of("benchmarks.head_difficulty", __doc__)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", choices=CASES, default=["digits"])
    parser.add_argument("--data-root", type=Path, help="torchvision's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / FIGURE)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    first: dict[str, dict[str, Array]] = {}

    def one(name: str, seed: int) -> dict[str, Any]:
        case = CASES[name]
        scores = measured(case, rows_of(name, args.data_root), seed)
        if seed == 0:
            first[name] = scores
        return result_of(scores)

    shared = SETTINGS | {"delta": DELTA, "order": ORDER}
    settings = {name: shared | asdict(CASES[name]) for name in args.sets}
    cases = run_missing(args.out / STORED, settings, args.num_seeds, one)
    if "digits" in first:
        seeds = list(cases["digits"]["seeds"].values())
        figure(first["digits"], seeds, args.figure)
    publish(args.out / STORED, markdown({"cases": cases}))


if __name__ == "__main__":
    main()
