"""How close are losses from few norms to losses from exact norms at every update?

    python -m benchmarks.observed_vs_exact --data-root DIR

DP-SGD with Poisson batches on digits (MLP; clipped at 1, and at 10, where few examples
stay at the clip norm) and on 2,000 images of Fashion-MNIST (small CNN; files in
``DIR``). The engine observes an example only at the updates that draw it. In the same
run, the norms of all examples are measured exactly before every update. All ledgers go
through the same accounting and are compared with the exact losses: by Spearman's
correlation over the examples, and by the least and largest ratio, which show how far a
loss is underestimated or overestimated. Compared are observed ledgers under three rules
and with gaps filled by rank, and swept ledgers of N evenly spaced rows. Mean over seeds
[least, largest].

Results are stored in ``benchmarks/results/observed_vs_exact.json`` after every seed,
and stored seeds are not run again. The table is written beside this file.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from torch import nn

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, over_seeds, publish, run_missing
from benchmarks.common.training import PrivateRecipe, train_privately
from opacus_pi import GradNormLedger
from opacus_pi.accounting import filled_by_rank, privacy_losses
from opacus_pi.gradients import norm_sweep

CRITERION = nn.CrossEntropyLoss()
NUM_ROWS = (5, 10, 20, 35, 75, 150)
OUT = Path("benchmarks/results/observed_vs_exact.json")


@dataclass(frozen=True)
class Case:
    """One training and the order of its losses."""

    data_set: str
    recipe: PrivateRecipe
    num_train: int = 0
    order: float = 8.0

    def settings(self) -> dict[str, Any]:
        """Return all but the seed, for the table and to recognise stored results."""
        facts = {**asdict(self), **asdict(self.recipe)}
        return {name: facts[name] for name in _SETTINGS}


_SETTINGS = (
    "data_set",
    "num_train",
    "model",
    "num_epochs",
    "batch_size",
    "learning_rate",
    "noise_multiplier",
    "max_grad_norm",
    "order",
)
CASES = {
    "digits": Case("digits", PrivateRecipe("mlp", 20, 64, 0.5)),
    "digits, clipped at 10": Case(
        "digits", PrivateRecipe("mlp", 20, 64, 0.1, max_grad_norm=10.0)
    ),
    "fashion-mnist": Case(
        "fashion-mnist", PrivateRecipe("small-cnn", 20, 128, 0.5), num_train=2000
    ),
}


def ledgers(
    case: Case, images: data.ImageData, seed: int
) -> tuple[GradNormLedger, GradNormLedger]:
    """Train once; return the observed ledger and the exact one (a row per update)."""
    norms = []

    def measure(model: nn.Module) -> None:
        norms.append(
            norm_sweep(model, CRITERION, images.train, batch_size=256, progress=False)
        )

    _, engine = train_privately(
        case.recipe,
        images.train,
        images.image_shape,
        seed,
        before_update=measure,
    )
    observed = engine.ledger
    exact = GradNormLedger(observed.mechanism, np.arange(len(norms)), np.stack(norms))
    return observed, exact


def thinned(exact: GradNormLedger, num_rows: int) -> GradNormLedger:
    """Return evenly spaced rows of the exact ledger, as sweeps would measure them."""
    last = exact.mechanism.num_steps
    steps = np.round(last * np.arange(1, num_rows + 1) / num_rows)
    rows = np.unique(np.minimum(steps, last - 1).astype(int))
    return GradNormLedger(exact.mechanism, rows, exact.grad_norms[rows])


def compare(losses: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return Spearman's correlation and quantiles of the ratio to the exact loss."""
    ratio = losses / exact
    return {
        "spearman": float(stats.spearmanr(losses, exact).statistic),
        "min_ratio": float(ratio.min()),
        "tenth_ratio": float(np.quantile(ratio, 0.1)),
        "median_ratio": float(np.median(ratio)),
        "max_ratio": float(ratio.max()),
    }


def compared(
    observed: GradNormLedger, exact: GradNormLedger, order: float
) -> dict[str, dict[str, float]]:
    """Compare every way to record the run with the exact losses."""
    # an exact row is measured before the update that it covers: the left rule
    truth = privacy_losses(exact, order, rule="left")
    found = {
        f"observed, {rule}": privacy_losses(observed, order, rule=rule)
        for rule in ("right", "trapezoid", "max")
    }
    found["observed, gaps by rank"] = privacy_losses(filled_by_rank(observed), order)
    for num_rows in NUM_ROWS:
        found[f"swept, {num_rows} rows"] = privacy_losses(
            thinned(exact, num_rows), order
        )
    return {name: compare(losses, truth) for name, losses in found.items()}


def table(cases: dict[str, Any]) -> str:
    """Return Markdown tables of all cases."""
    keys = ("spearman", "min_ratio", "tenth_ratio", "max_ratio")
    parts = []
    for name, case in cases.items():
        facts, seeds = case["settings"], list(case["seeds"].values())
        rows = [["norms", "Spearman", "least ratio", "10 %", "largest ratio"]]
        for way in seeds[0]:
            cells = (over_seeds(seed[way][key] for seed in seeds) for key in keys)
            rows.append([way, *cells])
        parts.append(
            f"## {name}\n\n{facts['model']}, {facts['num_epochs']} epochs, batches of "
            f"{facts['batch_size']}, noise multiplier {facts['noise_multiplier']:g}, "
            f"clip norm {facts['max_grad_norm']:g}, order {facts['order']:g}, "
            f"{len(seeds)} seeds: mean [least, largest].\n\n{markdown(rows)}\n"
        )
    note = (
        "# Losses from few norms against losses from exact norms at every update\n\n"
        "Made by `python -m benchmarks.observed_vs_exact`. A ratio below 1 charges an "
        "example too little; 10 %: a tenth of the examples has a smaller ratio.\n\n"
    )
    return note + "\n".join(parts)


def main() -> None:
    """Run the missing seeds, print the table, and write both files."""
    parser = parser_of("benchmarks.observed_vs_exact", __doc__)
    add_options(parser, CASES, OUT)
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data")
    args = parser.parse_args()
    images = cache(
        lambda case: data.load(case.data_set, args.data_root, case.num_train)
    )

    def measure(name: str, seed: int) -> dict[str, Any]:
        case = CASES[name]
        return compared(*ledgers(case, images(case), seed), case.order)

    settings = {name: CASES[name].settings() for name in args.cases}
    publish(args.out, table(run_missing(args.out, settings, args.seeds, measure)))


if __name__ == "__main__":
    main()
