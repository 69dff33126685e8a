"""Train, rank, unlearn, compare: the complete chain on real data by one command.

    python -m benchmarks.main_job                  # digits, under 5 minutes, 2 cores
    python -m benchmarks.main_job --dataset cifar10 --data-root DIR

Claim under test (paper, Section 6.1): forget sets of higher privacy loss take longer to
unlearn by noisy fine-tuning. For every seed: train with noise (SGLD) through
``PrivacyEngine.make_monitored``; rank the training examples by privacy loss; build the
five strata of Appendix D; for each stratum retrain oracles without it, and unlearn it
from the trained model by the same noisy gradient descent on the rest; count the epochs
until the unlearned model is within the tolerance of the mean oracle. In addition, a
DP-SGD run through ``make_private`` gives each example's own epsilon, with an upper
limit. The figure shows the epsilons of the first seed, and beside them how far the
model is from retrained models while it unlearns the easiest and the hardest stratum.

Every seed and every oracle is saved when it is finished, so an interrupted run
continues where it stopped. Results: ``OUT/results.json``, ``OUT/figure.png``.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import joblib
import matplotlib
import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.facts import facts_of
from benchmarks.common.models import build_model
from benchmarks.common.report import write_json
from benchmarks.common.training import (
    DIGITS,
    PrivateRecipe,
    Recipe,
    train,
    train_privately,
)
from benchmarks.main_job_report import publish
from opacus_pi import Langevin, PrivacyEngine, Unlearner
from opacus_pi.difficulty.forget_sets import difficulty_strata, retain_indices
from opacus_pi.evaluation import OracleCache, evaluate, time_to_unlearn

CRITERION = nn.CrossEntropyLoss()
NUM_SHOWN = 250  # examples whose own epsilons are stored, for the figure


@dataclass(frozen=True)
class Settings:
    """One experiment.

    Attributes:
        dataset: Name of the data set.
        num_train: Training images used (0: all).
        recipe: How the model and its oracles are trained, and the model unlearned.
        stratum_size: Examples in each forget set.
        unlearn_epochs: Epochs of every unlearning run.
        num_oracles: Models retrained without each forget set.
        order: Renyi order of the privacy losses.
        tolerance: Points of accuracy within which a model counts as unlearned; for
            the loss, the larger of this (nats) and this share times 2 of the oracle's.
        dp_epochs: Epochs of the DP-SGD run.
        dp_learning_rate: Its learning rate.
        noise_multiplier: Its noise multiplier, at ``max_grad_norm`` 1.
        delta: Delta of its epsilons.
    """

    dataset: str
    num_train: int
    recipe: Recipe
    stratum_size: int
    unlearn_epochs: int
    num_oracles: int = 3
    order: float = 8.0
    tolerance: float = 0.05
    dp_epochs: int = 20
    dp_learning_rate: float = 0.5
    noise_multiplier: float = 1.0
    delta: float = 1e-5


IMAGES = Recipe("small-cnn", 30, 128, 0.05, momentum=0.9, noise_std=0.01)
SETTINGS = {
    "digits": Settings("digits", 0, DIGITS, stratum_size=60, unlearn_epochs=40),
    **{
        name: Settings(name, 10_000, IMAGES, stratum_size=200, unlearn_epochs=25)
        for name in ("fashion-mnist", "cifar10", "svhn")
    },
}


def run_seed(settings: Settings, images: data.ImageData, seed: int, out: Path) -> dict:
    """Run the whole chain for one seed.

    Returns:
        ``strata`` (one dict each) and ``privacy`` (the DP-SGD run), JSON-able.
    """
    torch.set_num_threads(1)
    recipe = settings.recipe
    model, engine = train(recipe, images.train, images.image_shape, seed)
    losses = engine.privacy_losses(order=settings.order)
    strata = difficulty_strata(losses, settings.stratum_size)
    percentiles = losses.argsort().argsort() / (len(losses) - 1) * 100
    rows = []
    for name, forget in strata.items():
        row = forget_stratum(settings, images, model, engine, forget, seed, out)
        row |= {
            "stratum": name,
            "mean_loss": float(losses[forget].mean()),
            "percentile": float(percentiles[forget].mean()),
        }
        rows.append(row)
    return {"seed": seed, "strata": rows, "privacy": privacy_of(settings, images, seed)}


def forget_stratum(
    settings: Settings,
    images: data.ImageData,
    model: nn.Module,
    engine: object,
    forget: np.ndarray,
    seed: int,
    out: Path,
) -> dict:
    """Unlearn one forget set and compare the model with its oracles."""
    recipe, train_set = settings.recipe, images.train
    retain = retain_indices(len(train_set), forget)
    probe = np.random.default_rng(seed).permutation(retain)[: len(images.test)]
    parts = {"forget": Subset(train_set, forget), "retain": Subset(train_set, probe)}

    def measure(net: nn.Module) -> dict[str, float]:
        return evaluate(net, CRITERION, **parts, test=images.test)

    oracles = [measure(net) for net in retrained(settings, images, forget, seed, out)]
    unlearner = Unlearner(
        model,
        criterion=CRITERION,
        method=Langevin(recipe.noise_std),
        optimizer=recipe.optimizer,
        ledger=engine.ledger,
        generator=torch.Generator().manual_seed(seed),
    )
    result = unlearner.unlearn(
        train_set,
        forget,
        num_epochs=settings.unlearn_epochs,
        evaluate=measure,
        batch_size=recipe.batch_size,
    )
    oracle = {name: [one[name] for one in oracles] for name in oracles[0]}
    trace = {name: list(map(float, v)) for name, v in result.trace.metrics.items()}
    return {
        "oracle": oracle,
        "trace": trace,
        "times": times_to_unlearn(settings, result.trace, oracle),
        "guarantee": result.guarantee.kind,
    }


def retrained(
    settings: Settings, images: data.ImageData, forget: np.ndarray, seed: int, out: Path
) -> list[nn.Module]:
    """Return the oracles of a forget set, trained on the rest with other seeds."""

    def retrain(kept: np.ndarray, oracle_seed: int) -> nn.Module:
        part = Subset(images.train, kept)
        shape = images.image_shape
        return train(settings.recipe, part, shape, oracle_seed, num_checkpoints=1)[0]

    return OracleCache(out / "oracles").train(
        retrain,
        key=settings.recipe.key() | {"dataset": settings.dataset},
        data_set=images.train,
        forget_indices=forget,
        seeds=[10_000 + 100 * seed + k for k in range(settings.num_oracles)],
        model_factory=lambda: build_model(settings.recipe.model, images.image_shape),
    )


def times_to_unlearn(settings: Settings, trace: object, oracle: dict) -> dict:
    """Return epochs to unlearn by accuracy and by loss on the forget set."""
    share = 2 * settings.tolerance * float(np.mean(oracle["forget_loss"]))
    tolerances = {
        "unlearning_accuracy": settings.tolerance,
        "forget_loss": max(settings.tolerance, share),
    }
    return {
        metric: float(time_to_unlearn(trace, oracle, metric=metric, tolerance=width))
        for metric, width in tolerances.items()
    }


def privacy_of(settings: Settings, images: data.ImageData, seed: int) -> dict:
    """Return epsilons of a DP-SGD run with the drop-in engine."""
    model, engine = train_privately(
        private_recipe(settings), images.train, images.image_shape, seed
    )
    return spent(model, engine, images, settings.delta) | {
        "shown": shown_epsilons(engine, settings.delta)
    }


def shown_epsilons(engine: PrivacyEngine, delta: float) -> dict[str, list[float]]:
    """Return estimates and upper limits of ε, of examples at all quantiles of ε."""
    epsilons = engine.epsilons(delta=delta)
    limits = engine.epsilon_limits(delta=delta)
    places = np.linspace(0, len(epsilons) - 1, NUM_SHOWN).round().astype(int)
    shown = np.argsort(epsilons, kind="stable")[places]
    return {
        "epsilons": epsilons[shown].tolist(),
        "epsilon_limits": limits[shown].tolist(),
    }


def private_recipe(settings: Settings) -> PrivateRecipe:
    """Return the recipe of the DP-SGD run, at clip norm 1."""
    return PrivateRecipe(
        settings.recipe.model,
        settings.dp_epochs,
        settings.recipe.batch_size,
        settings.dp_learning_rate,
        noise_multiplier=settings.noise_multiplier,
    )


def spent(
    model: nn.Module, engine: PrivacyEngine, images: data.ImageData, delta: float
) -> dict:
    """Return worst-case and per-example epsilons and accuracy of a DP-SGD run."""
    test = evaluate(
        model, CRITERION, forget=images.test, retain=images.train, test=images.test
    )
    epsilons = engine.epsilons(delta=delta)
    return {
        "worst_case_epsilon": engine.get_epsilon(delta=delta),
        "epsilon_quantiles": np.quantile(epsilons, [0, 0.1, 0.5, 0.9, 1]).tolist(),
        "test_accuracy": test["test_accuracy"],
        "attribution": dict(engine.attribution),
    }


def saved_seed(
    settings: Settings, images: data.ImageData, seed: int, out: Path
) -> dict:
    """Run a seed, or read its result if the same settings have been run."""
    path = out / f"seed_{seed}.json"
    described = json.loads(json.dumps(facts_of(settings)))
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["settings"] == described:
                return saved["result"]
        except (ValueError, KeyError, TypeError):
            print(
                f"{path} cannot be read, so seed {seed} is run again.", file=sys.stderr
            )
    result = run_seed(settings, images, seed, out)
    write_json(path, {"settings": described, "result": result})
    return result


def main() -> None:
    """Parse the command line, run the seeds, print the table, write JSON and figure."""
    parser = parser_of("benchmarks.main_job", __doc__)
    parser.add_argument("--dataset", choices=data.NAMES, default="digits")
    parser.add_argument("--data-root", type=Path, help="folder of the data set's files")
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of seeds (at least 2)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="default: runs/DATASET")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(
            f"--seeds must be at least 2, got {args.seeds}: with one seed, nothing "
            "shows how much the times vary. 5 is usual."
        )
    matplotlib.use("Agg")
    os.environ["TQDM_DISABLE"] = "1"  # in the workers; here tqdm is imported already
    settings = SETTINGS[args.dataset]
    out = args.out or Path("runs") / args.dataset
    images = data.load(args.dataset, args.data_root, settings.num_train)
    pool = joblib.Parallel(n_jobs=args.jobs, return_as="generator_unordered")
    done = pool(
        joblib.delayed(saved_seed)(settings, images, seed, out)
        for seed in range(args.seeds)
    )
    bar = tqdm(done, total=args.seeds, desc="seeds", unit="seed")
    results = sorted(bar, key=lambda one: one["seed"])
    publish(results, facts_of(settings), out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. Give the same command again to continue from here."
        ) from None
