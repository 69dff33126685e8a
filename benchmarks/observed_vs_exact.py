"""How close are losses from few norms to losses from exact norms at every update?

    python -m benchmarks.observed_vs_exact --data-root DIR

DP-SGD with Poisson batches on digits (MLP) and on 2,000 images each of Fashion-MNIST
and CIFAR-10 (small CNN; files in ``DIR``), clipped at 1, 3 and 10, so that few to most
examples stay below the clip norm. The engine observes an example only at the updates
that draw it. In the same run, the norms of all examples are measured exactly before
every update.

Compared with the exact losses (plain sums over the updates, at orders 2, 8 and 32, and
epsilons at 1e-5) are the estimates from the draws, for each way to fill the gaps, and
from swept rows. The least ratio shows how far somebody is charged too little. Of the
upper limits at 95 % confidence the coverage is measured, over the examples and over
draws that are redrawn from the same exact norms; of the standard errors how large they
are beside the true errors. Mean over seeds [least, largest].

Results are stored in ``benchmarks/results/observed_vs_exact.json`` after every seed,
and stored seeds are not run again. The table is written beside this file.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.models import build_model
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, over_seeds, publish, run_missing
from benchmarks.common.training import PrivateRecipe
from opacus_pi import GradNormLedger, PrivacyEngine, Recorder
from opacus_pi.accounting import (
    epsilon_limits,
    loss_limits,
    privacy_losses,
    rdp_to_epsilon,
    standard_errors,
)
from opacus_pi.gradients import norm_sweep

CRITERION = nn.CrossEntropyLoss()
NUM_SWEPT = (5, 35, 150)
ORDERS = (2.0, 8.0, 32.0)
ORDERS_OF_EPSILON = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 32, 48)
DELTA = 1e-5
PLAIN = {"hoelder_p": math.inf, "tolerance": 1e-6}  # the sum over the updates
ROWS_AN_EPOCH = 5
NUM_REDRAWN = 3
OUT = Path("benchmarks/results/observed_vs_exact.json")


@dataclass(frozen=True)
class Case:
    """One training."""

    data_set: str
    recipe: PrivateRecipe
    num_train: int = 0

    def settings(self) -> dict[str, Any]:
        """Return all but the seed, for the table and to recognise stored results."""
        facts = {**asdict(self), **asdict(self.recipe)}
        asked = {"orders": ORDERS, "delta": DELTA, "redrawn": NUM_REDRAWN}
        return {**{name: facts[name] for name in _SETTINGS}, **asked}


_SETTINGS = (
    "data_set",
    "num_train",
    "model",
    "num_epochs",
    "batch_size",
    "learning_rate",
    "noise_multiplier",
    "max_grad_norm",
)


def _mlp(learning_rate: float, max_grad_norm: float) -> PrivateRecipe:
    """Return a training of the MLP."""
    return PrivateRecipe("mlp", 20, 64, learning_rate, max_grad_norm=max_grad_norm)


def _cnn(learning_rate: float, max_grad_norm: float) -> PrivateRecipe:
    """Return a training of the small CNN."""
    return PrivateRecipe(
        "small-cnn", 10, 64, learning_rate, max_grad_norm=max_grad_norm
    )


CASES = {
    "digits, clipped at 1": Case("digits", _mlp(0.5, 1.0)),
    "digits, clipped at 3": Case("digits", _mlp(0.2, 3.0)),
    "digits, clipped at 10": Case("digits", _mlp(0.1, 10.0)),
    "fashion-mnist, clipped at 1": Case("fashion-mnist", _cnn(0.5, 1.0), 2000),
    "fashion-mnist, clipped at 3": Case("fashion-mnist", _cnn(0.2, 3.0), 2000),
    "fashion-mnist, clipped at 10": Case("fashion-mnist", _cnn(0.1, 10.0), 2000),
    "cifar10, clipped at 1": Case("cifar10", _cnn(0.5, 1.0), 2000),
    "cifar10, clipped at 3": Case("cifar10", _cnn(0.2, 3.0), 2000),
    "cifar10, clipped at 10": Case("cifar10", _cnn(0.1, 10.0), 2000),
}


def ledgers(
    case: Case, images: data.ImageData, seed: int
) -> tuple[GradNormLedger, GradNormLedger]:
    """Train once; return what was observed at each update, and the exact norms."""
    recipe, norms = case.recipe, []
    torch.manual_seed(seed)
    model = build_model(recipe.model, images.image_shape)
    loader = DataLoader(images.train, batch_size=recipe.batch_size, shuffle=True)
    updates = range(1, recipe.num_epochs * len(loader) + 1)
    engine = PrivacyEngine(accountant="rdp", recorder=Recorder(every=tuple(updates)))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=recipe.optimizer(model.parameters()),
        data_loader=loader,
        noise_multiplier=recipe.noise_multiplier,
        max_grad_norm=recipe.max_grad_norm,
    )
    for _ in range(recipe.num_epochs):
        for x, y in loader:
            sweep = norm_sweep(
                model, CRITERION, images.train, batch_size=256, progress=False
            )
            norms.append(sweep)
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
    observed = engine.ledger
    # A row stands for the updates since the row before: that of update t at step t.
    exact = GradNormLedger(observed.mechanism, np.arange(len(norms)) + 1, norms)
    return observed, exact


def merged(observed: GradNormLedger, rows_an_epoch: float) -> GradNormLedger:
    """Return the record that a recorder of fewer rows would have kept.

    Args:
        observed: A record with a row for each update.
        rows_an_epoch: Number of rows in ``1 / sample_rate`` updates.
    """
    rate = float(observed.mechanism.sample_rate)
    size = max(1, round(1 / rate / rows_an_epoch))
    num_steps = observed.mechanism.num_steps
    ends = [*range(size, num_steps, size), num_steps]
    rows, start = [], 0
    for end in ends:
        latest = observed.grad_norms[start]
        for row in observed.grad_norms[start + 1 : end]:
            latest = np.where(np.isnan(row), latest, row)
        rows.append(latest)
        start = end
    return GradNormLedger(observed.mechanism, ends, rows, source="observed")


def redrawn(exact: GradNormLedger, seed: int) -> GradNormLedger:
    """Return what other Poisson draws would have observed of the same norms."""
    generator = np.random.default_rng(seed)
    rate = float(exact.mechanism.sample_rate)
    drawn = generator.random(exact.grad_norms.shape) < rate
    rows = np.where(drawn, exact.grad_norms, np.nan)
    return GradNormLedger(exact.mechanism, exact.steps, rows, source="observed")


def thinned(exact: GradNormLedger, num_rows: int) -> GradNormLedger:
    """Return evenly spaced rows of the exact ledger, as sweeps would measure them."""
    num_rows = min(num_rows, exact.num_rows)
    chosen = np.round(exact.num_rows * np.arange(1, num_rows + 1) / num_rows) - 1
    rows = np.unique(chosen.astype(int))
    return GradNormLedger(exact.mechanism, exact.steps[rows], exact.grad_norms[rows])


def compare(losses: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return Spearman's correlation and quantiles of the ratio to the exact loss."""
    ratio = losses / exact
    return {
        "spearman": float(stats.spearmanr(losses, exact).statistic),
        "min_ratio": float(ratio.min()),
        "percent_ratio": float(np.quantile(ratio, 0.01)),
        "tenth_ratio": float(np.quantile(ratio, 0.1)),
        "upper_ratio": float(np.quantile(ratio, 0.99)),
        "max_ratio": float(ratio.max()),
        "total_ratio": float(losses.sum() / exact.sum()),
    }


def compared(
    observed: GradNormLedger, exact: GradNormLedger
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare every way to record the run with the exact losses, by what is asked."""
    rows = merged(observed, ROWS_AN_EPOCH)
    ways = {
        "smoothed (default)": partial(_ask, rows, gaps="smoothed"),
        "by rank": partial(_ask, rows, gaps="rank"),
        "next norm": partial(_ask, rows, gaps="next"),
        "next norm, one row an epoch": partial(_ask, merged(observed, 1), gaps="next"),
        "smoothed, one row an epoch": partial(
            _ask, merged(observed, 1), gaps="smoothed"
        ),
        **{
            f"swept, {num_rows} rows": partial(_ask, thinned(exact, num_rows))
            for num_rows in NUM_SWEPT
        },
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for asked in (*ORDERS, None):
        truth = _ask(exact, asked)
        name = "epsilon" if asked is None else f"order {asked:g}"
        found[name] = {way: compare(ask(asked), truth) for way, ask in ways.items()}
        found[name]["limit"] = limits_of(rows, exact, asked)
    return found


def limits_of(
    rows: GradNormLedger, exact: GradNormLedger, order: float | None
) -> dict[str, float]:
    """Return coverage and size of the upper limits, and of the standard errors.

    Args:
        rows: The observed record.
        exact: The exact one.
        order: Of the losses; None: epsilons.
    """
    exactly, limits = _ask(exact, order), _limits(rows, order)
    again = [
        _limits(merged(redrawn(exact, seed), ROWS_AN_EPOCH), order)
        for seed in range(NUM_REDRAWN)
    ]
    found = {
        "coverage": float((exactly <= limits).mean()),
        "coverage_redrawn": float(np.mean([exactly <= a for a in again])),
        "median_ratio": float(np.median(limits / exactly)),
        "upper_ratio": float(np.quantile(limits / exactly, 0.9)),
        "worst_miss": float((exactly / limits).max()),
    }
    if order is not None:
        errors = _ask(rows, order) - exactly
        expected = standard_errors(rows, order, **PLAIN)
        size = float((expected**2).sum())
        found["errors"] = math.sqrt((errors**2).sum() / size) if size else math.nan
    return found


def _ask(ledger: GradNormLedger, order: float | None, **options: Any) -> np.ndarray:
    """Return plain sums of losses at an order, or epsilons from plain sums."""
    if order is not None:
        return privacy_losses(ledger, order, **PLAIN, **options)
    losses = [privacy_losses(ledger, a, **PLAIN, **options) for a in ORDERS_OF_EPSILON]
    return rdp_to_epsilon(losses, ORDERS_OF_EPSILON, DELTA)


def _limits(ledger: GradNormLedger, order: float | None) -> np.ndarray:
    """Return upper limits of what ``_ask`` returns."""
    if order is None:
        return epsilon_limits(ledger, DELTA, orders=ORDERS_OF_EPSILON, **PLAIN)
    return loss_limits(ledger, order, **PLAIN)


def table(cases: dict[str, Any]) -> str:
    """Return Markdown tables of all cases."""
    keys = {
        "spearman": "Spearman",
        "min_ratio": "least ratio",
        "percent_ratio": "1 %",
        "tenth_ratio": "10 %",
        "upper_ratio": "99 %",
        "max_ratio": "largest ratio",
        "total_ratio": "total",
    }
    of_limit = {
        "coverage": "coverage",
        "coverage_redrawn": "coverage, redrawn",
        "median_ratio": "limit / truth, median",
        "upper_ratio": "90 %",
        "worst_miss": "largest truth / limit",
        "errors": "error / standard error",
    }
    parts = []
    for name, case in cases.items():
        facts, seeds = case["settings"], list(case["seeds"].values())
        rows = [["of", "norms", *keys.values()]]
        limits = [["of", *of_limit.values()]]
        for asked in seeds[0]:
            for way in seeds[0][asked]:
                one = [seed[asked][way] for seed in seeds]
                if way == "limit":
                    limits.append([asked, *_cells(one, of_limit)])
                else:
                    rows.append([asked, way, *_cells(one, keys)])
        parts.append(
            f"## {name}\n\n{facts['model']}, {facts['num_epochs']} epochs, batches of "
            f"{facts['batch_size']}, noise multiplier {facts['noise_multiplier']:g}, "
            f"{len(seeds)} seeds: mean [least, largest].\n\n{markdown(rows)}\n\n"
            f"Upper limits at 95 % and standard errors:\n\n{markdown(limits)}\n"
        )
    note = (
        "# Losses from few norms against losses from exact norms at every update\n\n"
        "Made by `python -m benchmarks.observed_vs_exact`. A ratio below 1 charges an "
        "example too little; 10 %: a tenth of the examples has a smaller ratio. Total: "
        "sum of the estimates over the sum of the exact losses. Observed records have "
        f"{ROWS_AN_EPOCH} rows an epoch unless another number is given.\n\n"
    )
    return note + "\n".join(parts)


def _cells(seeds: list[dict[str, float]], keys: dict[str, str]) -> list[str]:
    """Return the cells of a row, one for each key."""
    known = [key for key in keys if key in seeds[0]]
    cells = [over_seeds(seed[key] for seed in seeds) for key in known]
    return cells + [""] * (len(keys) - len(known))


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
        return compared(*ledgers(case, images(case), seed))

    settings = {name: CASES[name].settings() for name in args.cases}
    publish(args.out, table(run_missing(args.out, settings, args.seeds, measure)))


if __name__ == "__main__":
    main()
