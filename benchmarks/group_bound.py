"""Do group bounds distinguish forget sets of different difficulty?

    python -m benchmarks.group_bound          # under three minutes on one core

Claim under test (paper, Figure 4 and Appendix B.1): the group bound of Theorem B.1 does
not rise with the difficulty of the forget set, because it measures the noise of
minibatches. One SGLD run on digits (MLP) through ``make_monitored`` with its weights
kept; strata by privacy loss; σ = 0.1 on the mean gradient, order 8, 20 estimates of
Theorem B.1 as printed for each stratum and for no forget set at all. They are compared
with the library's bounds from the Gram matrices of the forget sets' own gradients. If
``reliable`` is false, ``coupled`` is a Monte Carlo value that is too low.
"""

import tempfile
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.report import environment, write_json
from benchmarks.common.set_ranges import sets_along_range
from benchmarks.common.training import DIGITS, Recipe, train
from opacus_pi import GradNormLedger
from opacus_pi.accounting import (
    GramLedger,
    group_divergence,
    privacy_losses,
    theorem_b1_estimates,
)
from opacus_pi.difficulty.forget_sets import difficulty_strata
from opacus_pi.recording import gram_ledger

CRITERION = nn.CrossEntropyLoss()
BOUNDS = ("coupled", "scalar", "operator_norm")
NOTHING = "no forget set"


def bounds_of(grams: GramLedger, order: float) -> dict[str, Any]:
    """Return the library's three bounds; ``reliable`` is false if one warned."""
    found: dict[str, Any] = {"reliable": True}
    for method in BOUNDS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[method] = group_divergence(grams, order, method=method)
        found["reliable"] &= not caught
    return found


def theorem_b1(grams: GramLedger, order: float) -> dict[str, Any]:
    """Return the estimates of Theorem B.1, their mean and standard deviation."""
    values = theorem_b1_estimates(grams, order)
    spread = float(values.std(ddof=1))
    return {"b1": float(values.mean()), "b1_std": spread, "b1_each": values.tolist()}


def flatness(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Measure how much the bounds differ between strata.

    Returns:
        ``b1_range_over_std``: largest minus smallest mean, over the mean standard
        deviation of one estimate. ``b1_anova_p``: chance of means so far apart if all
        strata were alike. ``NAME_last_over_first``: hardest stratum over easiest.
    """
    means = np.array([row["b1"] for row in rows])
    spread = np.mean([row["b1_std"] for row in rows])
    found = {
        "b1_range_over_std": float(np.ptp(means) / spread),
        "b1_anova_p": float(stats.f_oneway(*[row["b1_each"] for row in rows]).pvalue),
    }
    for name in ("b1", *BOUNDS):
        found[f"{name}_last_over_first"] = rows[-1][name] / rows[0][name]
    return found


@dataclass(frozen=True)
class Settings:
    """One run of the study.

    Attributes:
        seed: Of training and of the draws of minibatches.
        order: Renyi order.
        noise_std: Assumed noise on the mean gradient.
        estimates: Estimates of Theorem B.1 for each stratum.
        checkpoints: Rows of the ledger.
        stratum_size: Examples in a forget set.
        num_sets: Forget sets along the range of the loss; 0: five strata.
    """

    seed: int = 0
    order: float = 8.0
    noise_std: float = 0.1
    estimates: int = 20
    checkpoints: int = 12
    stratum_size: int = 60
    num_sets: int = 0


def _forget_sets(scores: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """Return the forget sets by name, easiest first."""
    if not settings.num_sets:
        return difficulty_strata(scores, settings.stratum_size)
    found = sets_along_range(scores, settings.stratum_size, settings.num_sets)
    return {str(number): one for number, one in enumerate(found, 1)}


def measure(
    ledger: GradNormLedger,
    weights: Path,
    model: nn.Module,
    train_set: Dataset,
    settings: Settings,
) -> list[dict[str, Any]]:
    """Return all numbers of every stratum, and Theorem B.1 without a forget set."""
    scores = privacy_losses(ledger, settings.order)
    strata = _forget_sets(scores, settings) | {NOTHING: []}
    rows = []
    for number, (name, forget) in enumerate(tqdm(strata.items(), unit="stratum")):
        shared = (weights, model, CRITERION, train_set, forget, ledger)
        pairs = gram_ledger(
            *shared,
            kind="minibatch",
            num_estimates=settings.estimates,
            generator=np.random.default_rng([settings.seed, number]),
            batch_size=256,
        )
        row = {"stratum": name} | theorem_b1(pairs, settings.order)
        if name != NOTHING:
            row |= bounds_of(gram_ledger(*shared), settings.order)
            row["mean_loss"] = float(scores[forget].mean())
        rows.append(row)
    return rows


def study(
    settings: Settings,
    images: data.ImageData | None = None,
    recipe: Recipe = DIGITS,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train with SGLD and measure.

    Args:
        settings: What to measure.
        images: The training data; digits by default.
        recipe: The recipe; it must train with noise.
        device: Where the model is.

    Returns:
        One row per stratum, and one for no forget set.
    """
    torch.set_num_threads(1)
    images = images or data.load("digits")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        model, engine = train(
            recipe,
            images.train,
            images.image_shape,
            settings.seed,
            settings.checkpoints,
            weights,
            device,
        )
        ledger = engine.ledger
        ratio = ledger.mechanism.noise_std / recipe.noise_std
        assumed = ledger.with_noise_std(settings.noise_std * ratio)
        return measure(assumed, weights, model, images.train, settings)


def main() -> None:
    """Parse the command line, train, measure, print a table, and write the JSON."""
    parser = parser_of("benchmarks.group_bound", __doc__)
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            name,
            type=field.type,
            default=field.default,
            help=f"default: {field.default}",
        )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/group_bound.json")
    )
    args = vars(parser.parse_args())
    out = args.pop("out")
    begun = time.perf_counter()
    rows = study(Settings(**args))
    found = flatness(rows[:-1])
    for row in rows:
        own = ", ".join(f"{n} {row[n]:.4g}" for n in BOUNDS if n in row)
        print(f"{row['stratum']:>14}: B.1 {row['b1']:.3g} ± {row['b1_std']:.2g}; {own}")
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    write_json(
        out,
        {
            "settings": args,
            "environment": environment(),
            "seconds": round(time.perf_counter() - begun, 1),
            "strata": rows,
            "flatness": found,
        },
    )


if __name__ == "__main__":
    main()
