"""Time, memory and errors of per-example accounting, compared with exact sums.

The training run has 150 epochs, 35 checkpoints and ten orders. Targets for 50,000
examples: losses at most 1e-6 above the values of the published formula in 3 s, and at
most 1e-3 above those of the corrected formula in 6 s, never below either. Targets for
1,300,000 examples that are read from a file in parts: 30 ns for each norm and order,
and at most 100 MiB. Each case is measured in a process of its own, on one thread, in
CPU time, including the tables that the accounting prepares. The times of other
implementations are extrapolated from a few examples.
"""

import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from benchmarks.overhead.process_memory import peak_increase
from benchmarks.overhead.table import Row
from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.composition import printed_order

Array = NDArray[np.float64]
ORDERS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 256)
NUM_STEPS, NUM_ROWS, RATE, NOISE = 58_594, 35, 128 / 50_000, 1.0
TOLERANCES = {"icml2025": 1e-6, "corrected": 1e-3}  # of each convention
SECONDS = {"icml2025": 3, "corrected": 6}  # targets
NUM_EXAMPLES, NUM_STREAMED = 50_000, 1_300_000
NUM_CHECKED = {"icml2025": 4000, "corrected": 2000}  # examples with exact losses
CASES = [f"{NUM_EXAMPLES:,} examples"]
_OTHERS = {  # names of the extrapolated times in the table
    "numpy": "published sum by NumPy",
    "scipy_loop": "by a SciPy loop",
    "exact_icml2025": "exact, icml2025",
    "exact_corrected": "exact, corrected",
}
_SHOWN = f"{NUM_ROWS} checkpoints × {len(ORDERS)} orders"


def make_ledger(num_examples: int) -> GradNormLedger:
    """Make a run whose norms span four decades and fall over time."""
    rng = np.random.default_rng(0)
    base = rng.lognormal(-2, 1.2, num_examples).astype(np.float32)
    fall = np.geomspace(1.5, 0.5, NUM_ROWS)
    norms = np.empty((NUM_ROWS, num_examples), dtype=np.float32)
    for row, factor in zip(norms, fall, strict=True):
        row[:] = factor * base * rng.lognormal(0, 0.5, num_examples)
    steps = [round(NUM_STEPS * (i + 1) / NUM_ROWS) for i in range(NUM_ROWS)]
    return GradNormLedger(NoisySGD(NUM_STEPS, RATE, NOISE), steps, norms)


def seconds(task: Callable[[], Any]) -> float:
    """Return the CPU time of one call."""
    start = time.process_time()
    task()
    return time.process_time() - start


def account(ledger: GradNormLedger, convention: str) -> None:
    """Compute the losses at all orders."""
    for order in ORDERS:
        privacy_losses(
            ledger, order, convention=convention, tolerance=TOLERANCES[convention]
        )


def account_for(convention: str, num_examples: int, path: str) -> dict[str, float]:
    """Return time and memory of the losses of all examples, in this process.

    Args:
        convention: A key of ``TOLERANCES``.
        num_examples: Examples of the ledger.
        path: File from which the ledger is read in parts; empty: it is in memory.
    """
    ledger = None if path else make_ledger(num_examples)
    privacy_losses(make_ledger(2), 2.0, convention="icml2025", tolerance=0.5)  # imports
    spent = []

    def task() -> None:
        parts = [ledger] if ledger else GradNormLedger.load_chunks(path)
        spent.append(seconds(lambda: [account(part, convention) for part in parts]))

    mebibytes = peak_increase(task)
    values = num_examples * NUM_ROWS * len(ORDERS)
    return {
        "seconds": spent[0],
        "nanoseconds_per_value": 1e9 * spent[0] / values,
        "mebibytes": mebibytes,
    }


def in_own_process(
    convention: str, num_examples: int, path: str = ""
) -> dict[str, float]:
    """Return the result of ``account_for`` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(account_for, (convention, num_examples, path))


def errors(convention: str, num_examples: int) -> dict[str, float]:
    """Return the range of relative errors of losses, and the time of exact ones."""
    ledger, tolerance = make_ledger(num_examples), TOLERANCES[convention]
    found, spent = [], 0.0
    for order in ORDERS:
        start = time.process_time()
        exact = privacy_losses(ledger, order, convention=convention)
        spent += time.process_time() - start
        upper = privacy_losses(
            ledger, order, convention=convention, tolerance=tolerance
        )
        found.append(upper / exact - 1)
    values = num_examples * NUM_ROWS * len(ORDERS)
    return {
        "least": float(np.min(found)),
        "largest": float(np.max(found)),
        "exact_seconds_per_value": spent / values,
    }


def log_weights(order: int) -> tuple[Array, Array]:
    """Return log weights and exponents of the published sum, k = 0 … order."""
    k = np.arange(order + 1.0)
    binomials = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    weights = binomials + k * math.log(RATE) + (order - k) * math.log1p(-RATE)
    return weights, k * (k - 1) / 2


def others(num_examples: int) -> dict[str, float]:
    """Return seconds per value of the published sum, by NumPy and by a SciPy loop."""
    ledger = make_ledger(num_examples)
    squares = ledger.ratios() ** 2
    p = 3.0 * NUM_STEPS
    plans = [
        (row, log_weights(int(np.ceil(printed_order(order, p, step)))))
        for order in ORDERS
        for row, step in zip(squares, ledger.steps, strict=True)
    ]

    def by_numpy() -> None:
        for row, (weights, exponents) in plans:
            for i in range(0, len(row), 2048):
                terms = weights + np.outer(row[i : i + 2048], exponents)
                top = terms.max(axis=1, keepdims=True)
                np.log(np.exp(terms - top).sum(axis=1))

    def by_loop() -> None:
        for row, (weights, exponents) in plans:
            for square in row[:4]:
                logsumexp(weights + square * exponents)

    return {
        "numpy": seconds(by_numpy) / (len(plans) * num_examples),
        "scipy_loop": seconds(by_loop) / (len(plans) * 4),
    }


def measure(case: str) -> dict[str, Any]:
    """Return every case, the errors, and the extrapolated times of others."""
    results = {name: in_own_process(name, NUM_EXAMPLES) for name in TOLERANCES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        make_ledger(NUM_STREAMED).save(path)
        results["streamed"] = in_own_process("icml2025", NUM_STREAMED, str(path))
    checked = {name: errors(name, count) for name, count in NUM_CHECKED.items()}
    values = NUM_EXAMPLES * NUM_ROWS * len(ORDERS)
    extrapolated = {name: each * values for name, each in others(512).items()}
    for name, row in checked.items():
        extrapolated[f"exact_{name}"] = row.pop("exact_seconds_per_value") * values
    return {
        "cases": results,
        "relative_errors": checked,
        "extrapolated_s": extrapolated,
    }


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for case, result in found.items():
        spent, errors_of = result["cases"], result["relative_errors"]
        shown = "; ".join(
            f"{_OTHERS[name]}: {value:.0f} s"
            for name, value in result["extrapolated_s"].items()
        )
        for name, tolerance in TOLERANCES.items():
            quantity = f"accounting, {name}, {case} × {_SHOWN}"
            own = spent[name]
            yield Row(
                f"{quantity}: seconds", SECONDS[name], own["seconds"], shown, ".2f"
            )
            if name == "icml2025":
                yield Row(f"{quantity}: MiB", 200, own["mebibytes"], form=".0f")
            largest, least = errors_of[name]["largest"], errors_of[name]["least"]
            worst = largest if least >= 0 else math.inf
            remark = f"smallest {least:.1e}"
            if least >= 0:
                remark += ": never below the exact value"
            yield Row(
                f"{quantity}: relative error", tolerance, worst, remark, form=".1e"
            )
        streamed = spent["streamed"]
        quantity = f"accounting, {NUM_STREAMED:,} examples × {_SHOWN} read in parts"
        value = streamed["nanoseconds_per_value"]
        yield Row(f"{quantity}: ns per value", 30, value, form=".1f")
        yield Row(f"{quantity}: added MiB", 100, streamed["mebibytes"], form=".0f")
