"""How much smaller is an epsilon from numerical composition than from Rényi orders?

    python -m benchmarks.composed_epsilons --data-root DIR

DP-SGD with Poisson batches on 10,000 images of Fashion-MNIST (MLP, clipped at 1; files
in ``DIR``). The engine observes norms at the updates that draw an example; all norms
are also swept twenty times. The norms of this one training are then accounted for
several mechanisms: sample rate, noise multiplier and number of updates.

For each, ``epsilons(ledger, 1e-5)`` and ``epsilons(…, composition="numerical")`` are
compared example by example, with their times and the peak of the memory that they
allocate. For every twentieth example the smallest epsilon over 40 orders without
Hölder's growth of the orders is computed as well: it shows which part of the
difference is due to the conversion. Beside them stand the worst cases of Opacus's RDP
and PRV accountants.

Results are stored in ``benchmarks/results/composed_epsilons.json`` after every case,
and stored cases are not run again. The table is written beside this file.
"""

import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, publish, run_missing
from benchmarks.common.training import PrivateRecipe, train_privately
from opacus_pi import GradNormLedger
from opacus_pi.accounting import NoisySGD, epsilons, privacy_losses, rdp_to_epsilon
from opacus_pi.gradients import norm_sweep

OUT = Path("benchmarks/results/composed_epsilons.json")
DELTA = 1e-5
NUM_TRAIN, NUM_SWEEPS, EVERY = 10_000, 20, 20
RECIPE = PrivateRecipe("mlp", 10, 100, 0.5)
PLAIN_ORDERS = tuple((1 + np.geomspace(0.2, 400, 40)).tolist())
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Case:
    """A record and the mechanism for which it is accounted."""

    record: str
    sample_rate: float
    noise_multiplier: float
    num_steps: int

    def settings(self) -> dict[str, Any]:
        """Return all that determines the result."""
        facts = {"recipe": asdict(RECIPE), "num_train": NUM_TRAIN, "delta": DELTA}
        return {**asdict(self), **facts}


CASES = {
    "swept, as trained": Case("swept", 0.01, 1.0, 1000),
    "observed, as trained": Case("observed", 0.01, 1.0, 1000),
    "swept, long": Case("swept", 0.001, 0.7, 10_000),
    "swept, large batches": Case("swept", 0.1, 2.0, 500),
    "swept, full batches": Case("swept", 1.0, 20.0, 100),
}


def records(images: data.ImageData) -> dict[str, GradNormLedger]:
    """Train once; return the observed record and one of swept norms."""
    criterion, rows = nn.CrossEntropyLoss(), []
    num_steps = RECIPE.num_epochs * (len(images.train) // RECIPE.batch_size)
    due = {num_steps * i // NUM_SWEEPS for i in range(NUM_SWEEPS)}
    done = iter(range(num_steps))

    def sweep(model: nn.Module) -> None:
        if next(done) in due:
            swept = norm_sweep(
                model, criterion, images.train, batch_size=1000, progress=False
            )
            rows.append(swept)

    torch.manual_seed(0)
    _, engine = train_privately(RECIPE, images.train, images.image_shape, 0, sweep)
    observed = engine.ledger
    steps = num_steps * np.arange(1, NUM_SWEEPS + 1) // NUM_SWEEPS
    swept = GradNormLedger(observed.mechanism, steps, rows)
    return {"observed": observed, "swept": swept}


def accounted_as(ledger: GradNormLedger, case: Case) -> GradNormLedger:
    """Return a record's norms as those of a run with a case's mechanism."""
    mechanism = NoisySGD(
        case.num_steps,
        case.sample_rate,
        case.noise_multiplier * RECIPE.max_grad_norm,
        RECIPE.max_grad_norm,
    )
    steps = ledger.steps * case.num_steps // ledger.mechanism.num_steps
    return GradNormLedger(mechanism, steps, ledger.grad_norms, source=ledger.source)


def measured(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    """Return a function's result, its seconds of CPU, and the MiB it allocates."""
    tracemalloc.start()
    start = time.process_time()
    result = function()
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return result, seconds, peak


def compared(ledger: GradNormLedger, case: Case) -> dict[str, Any]:
    """Compare the two compositions for one case."""
    renyi, *of_renyi = measured(lambda: epsilons(ledger, DELTA))
    both, *of_both = measured(lambda: epsilons(ledger, DELTA, composition="numerical"))
    some = ledger.subset(np.arange(0, ledger.num_examples, EVERY))
    losses = [privacy_losses(some, a, hoelder_p=math.inf) for a in PLAIN_ORDERS]
    plain = rdp_to_epsilon(losses, PLAIN_ORDERS, DELTA)
    worst = {}
    for name, kind in {"rdp": RDPAccountant, "prv": PRVAccountant}.items():
        accountant = kind()
        accountant.history = [(case.noise_multiplier, case.sample_rate, case.num_steps)]
        if case.sample_rate < 1 or name == "rdp":  # Opacus's PRV needs a rate below 1
            worst[name] = float(accountant.get_epsilon(DELTA))
    return {
        "epsilon": np.quantile(renyi, QUANTILES).tolist(),
        "ratio": np.quantile(both / renyi, QUANTILES).tolist(),
        "ratio_to_plain": np.quantile(both[::EVERY] / plain, QUANTILES).tolist(),
        "largest": [float(renyi.max()), float(both.max())],
        "worst_case": worst,
        "seconds": {"renyi": of_renyi[0], "numerical": of_both[0]},
        "mebibytes": {"renyi": of_renyi[1], "numerical": of_both[1]},
    }


def table(cases: dict[str, Any]) -> str:
    """Return the Markdown page."""
    head = [
        "norms", "q", "noise", "updates", "worst case: RDP", "PRV",
        "Rényi ε: 5 %, median, 95 %", "numerical / Rényi: 5 %", "25 %", "median",
        "75 %", "95 %", "to plain Rényi sums: median", "largest: Rényi, numerical",
        "seconds: Rényi", "then numerical", "MiB: Rényi", "numerical",
    ]  # fmt: skip
    rows = [head]
    for case in cases.values():
        facts, found = case["settings"], next(iter(case["seeds"].values()))
        low, _, middle, _, high = found["epsilon"]
        prv = found["worst_case"].get("prv")
        rows.append(
            [
                facts["record"],
                *(f"{facts[k]:g}" for k in ("sample_rate", "noise_multiplier")),
                str(facts["num_steps"]),
                f"{found['worst_case']['rdp']:.3g}",
                "–" if prv is None else f"{prv:.3g}",
                f"{low:.2g}, {middle:.2g}, {high:.2g}",
                *(f"{ratio:.2f}" for ratio in found["ratio"]),
                f"{found['ratio_to_plain'][2]:.2f}",
                ", ".join(f"{value:.3g}" for value in found["largest"]),
                *(f"{value:.2g}" for value in found["seconds"].values()),
                *(f"{value:.0f}" for value in found["mebibytes"].values()),
            ]
        )
    return (
        "# Epsilons by numerical composition, against Rényi orders\n\n"
        "Made by `python -m benchmarks.composed_epsilons`: the norms of one DP-SGD "
        f"training on {NUM_TRAIN:,} images of Fashion-MNIST, clipped at 1, accounted "
        f"for several mechanisms, δ = {DELTA:g}. Ratios and quantiles are over the "
        "examples; a ratio below 1 means that numerical composition gives less. Plain "
        "Rényi sums have the best of 40 orders up to 401, without the growth of the "
        "orders by Hölder's inequality: what remains is due to the conversion. "
        "Seconds of CPU on one core. The numerical composition also asks for the Rényi "
        "epsilons, which limit its result; it is measured second, when Rényi's tables "
        "are kept from the first question. The cores were shared with other "
        "processes.\n\n"
        f"{markdown(rows)}\n"
    )


def main() -> None:
    """Run the missing cases, print the table, and write both files."""
    parser = parser_of("benchmarks.composed_epsilons", __doc__)
    add_options(parser, CASES, OUT)
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data")
    args = parser.parse_args()
    trained = cache(
        lambda: records(data.load("fashion-mnist", args.data_root, NUM_TRAIN))
    )

    def measure(name: str, seed: int) -> dict[str, Any]:
        case = CASES[name]
        return compared(accounted_as(trained()[case.record], case), case)

    settings = {name: CASES[name].settings() for name in args.cases}
    publish(args.out, table(run_missing(args.out, settings, 1, measure)))


if __name__ == "__main__":
    main()
