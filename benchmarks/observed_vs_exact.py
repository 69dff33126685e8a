"""How close are losses from observed norms to losses from exact norms at every step?

    python -m benchmarks.observed_vs_exact

One DP-SGD run per seed on digits (MLP, Poisson batches). The engine observes each
example only at the updates that draw it; beside it every example's norm is measured
exactly before every update. Both ledgers go through the same accounting. Printed and
written to ``OUT``: Spearman's correlation of the two losses over examples, the worst
ratio in either direction, and the same for swept ledgers of N evenly spaced rows.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import stats
from torch import nn
from tqdm import tqdm

from benchmarks import data
from benchmarks.report import environment, write_json
from benchmarks.training import Recipe, train_privately
from opacus_pi import GradNormLedger
from opacus_pi.accounting import privacy_losses
from opacus_pi.gradients import norm_sweep

CRITERION = nn.CrossEntropyLoss()


def ledgers(
    images: data.ImageData, seed: int, num_epochs: int, noise_multiplier: float
) -> tuple[GradNormLedger, GradNormLedger]:
    """Train once; return the observed ledger and the exact one (a row per update)."""
    norms = []

    def measure(model: nn.Module) -> None:
        norms.append(
            norm_sweep(model, CRITERION, images.train, batch_size=512, progress=False)
        )

    _, engine = train_privately(
        Recipe("mlp", num_epochs, batch_size=64, learning_rate=0.5),
        images.train,
        images.image_shape,
        seed,
        noise_multiplier,
        before_update=measure,
    )
    observed = engine.ledger
    exact = GradNormLedger(observed.mechanism, np.arange(len(norms)), np.stack(norms))
    return observed, exact


def compare(losses: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Spearman's correlation and the worst ratio in either direction."""
    ratio = losses / exact
    return {
        "spearman": float(stats.spearmanr(losses, exact).statistic),
        "max_ratio": float(ratio.max()),
        "min_ratio": float(ratio.min()),
        "median_ratio": float(np.median(ratio)),
    }


def thinned(exact: GradNormLedger, num_rows: int) -> GradNormLedger:
    """Evenly spaced rows of the exact ledger, as a sweep after those updates has."""
    last = exact.mechanism.num_steps
    steps = np.unique(np.round(last * np.arange(1, num_rows + 1) / num_rows))
    rows = np.minimum(steps, last - 1).astype(int)
    return GradNormLedger(exact.mechanism, rows, exact.grad_norms[rows])


def main() -> None:
    """Run the seeds, print a table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--noise-multiplier", type=float, default=1.0)
    parser.add_argument("--order", type=float, default=8.0)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/observed_vs_exact.json")
    )
    args = parser.parse_args()
    images = data.load("digits")
    rows = []
    for seed in tqdm(range(args.seeds), unit="seed"):
        observed, exact = ledgers(images, seed, args.epochs, args.noise_multiplier)
        # the exact row before update t speaks for update t: the left rule
        truth = privacy_losses(exact, args.order, rule="left")
        found = {
            f"observed, {rule}": privacy_losses(observed, args.order, rule=rule)
            for rule in ("right", "trapezoid", "max")
        }
        for num_rows in (5, 10, 35, 150):
            swept = thinned(exact, num_rows)
            found[f"swept, {num_rows} rows"] = privacy_losses(swept, args.order)
        rows.append({name: compare(one, truth) for name, one in found.items()})
    for name in rows[0]:
        cells = {
            key: np.array([row[name][key] for row in rows]) for key in rows[0][name]
        }
        text = ", ".join(
            f"{key} {values.mean():.4f} [{values.min():.4f}, {values.max():.4f}]"
            for key, values in cells.items()
        )
        print(f"{name:>20}: {text}")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    write_json(
        args.out, {"settings": settings, "environment": environment(), "seeds": rows}
    )


if __name__ == "__main__":
    main()
