"""How many examples share the largest privacy loss, by the clip norm?

    python -m benchmarks.clip_norms                # 2 minutes on one core

An example that is clipped in every update has the largest possible loss. Examples that
were clipped whenever they were observed share it, and so do examples whose estimate was
capped at it. A small clip norm therefore makes many examples indistinguishable. DP-SGD
on digits as in the main job (MLP, 20 epochs, Poisson batches of 64, noise multiplier 1)
at rising clip norms C, with the learning rate 0.5 / C, so that the noise on the weights
is always the same. The norms are observed. Mean over seeds [least, largest].

Results are stored in ``benchmarks/results/clip_norms.json`` after every seed, and
stored seeds are not run again. The table is written beside this file.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.facts import facts_of
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, over_seeds, publish, run_missing
from benchmarks.common.training import PrivateRecipe, train_privately
from benchmarks.main_job import SETTINGS, private_recipe, spent
from opacus_pi.difficulty.forget_sets import num_at_top

OUT = Path("benchmarks/results/clip_norms.json")
DIGITS = SETTINGS["digits"]


@dataclass(frozen=True)
class Case:
    """One DP-SGD recipe, and order and delta of its losses."""

    recipe: PrivateRecipe
    order: float = DIGITS.order
    delta: float = DIGITS.delta


def _at(max_grad_norm: float) -> Case:
    """Return the main job's run at another clip norm, with equal weight noise."""
    rate = DIGITS.dp_learning_rate / max_grad_norm
    recipe = private_recipe(DIGITS)
    return Case(replace(recipe, learning_rate=rate, max_grad_norm=max_grad_norm))


CASES = {f"{norm:g}": _at(norm) for norm in (0.5, 1, 2, 5, 10, 20)}


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Train once; return ties, epsilons and test accuracy."""
    images = data.load("digits")
    model, engine = train_privately(case.recipe, images.train, images.image_shape, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*share the largest value")
        losses = engine.privacy_losses(order=case.order)
        found = spent(model, engine, images, case.delta)
    return found | {"num_at_top": num_at_top(losses), "num_examples": len(losses)}


def table(cases: dict[str, Any]) -> str:
    """Return a Markdown table of all clip norms."""
    rows = [
        (
            "clip norm",
            "learning rate",
            "share the largest loss",
            "test accuracy",
            "worst-case ε",
            "own ε: 10 %",
            "median",
        )
    ]
    for name in (name for name in CASES if name in cases):
        facts, seeds = cases[name]["settings"], list(cases[name]["seeds"].values())
        tenths, medians = (
            over_seeds((s["epsilon_quantiles"][k] for s in seeds), ".2f")
            for k in (1, 2)
        )
        rows.append(
            (
                name,
                f"{facts['recipe']['learning_rate']:g}",
                over_seeds((s["num_at_top"] for s in seeds), ".0f"),
                over_seeds((s["test_accuracy"] for s in seeds), ".3f"),
                over_seeds((s["worst_case_epsilon"] for s in seeds), ".2f"),
                tenths,
                medians,
            )
        )
    return _NOTE.format(delta=DIGITS.delta) + markdown(rows) + "\n"


_NOTE = """# Examples that share the largest privacy loss, by clip norm

Made by `python -m benchmarks.clip_norms`: DP-SGD on 1,437 digits, observed norms, order
8, δ = {delta:g}. Mean over seeds [least, largest].

"""


def main() -> None:
    """Run the missing seeds, print the table, and write both files."""
    parser = parser_of("benchmarks.clip_norms", __doc__)
    add_options(parser, CASES, OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: facts_of(CASES[name]) for name in args.cases}
    found = run_missing(
        args.out, settings, args.seeds, lambda name, seed: measure(CASES[name], seed)
    )
    publish(args.out, table(found))


if __name__ == "__main__":
    main()
