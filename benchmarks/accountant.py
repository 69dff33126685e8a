"""Time, memory and errors of per-example accounting, compared with exact sums.

    python -m benchmarks.accountant

A training run of 150 epochs, 35 checkpoints, ten orders. One thread, CPU time. Claimed:
50,000 examples at most 1e-6 above the published formula's values, never below, in 3 s;
at most 1e-3 above the corrected one's in 6 s; 1,300,000 examples read from a file in
parts, 30 ns for each norm and order and less than 100 MB. Each of these is measured in
a process of its own, tables included. The peers' times are extrapolated from a few
examples. Written to ``OUT``.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from benchmarks.common.report import environment, write_json
from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.composition import printed_order

Array = NDArray[np.float64]
OUT = Path(__file__).parent / "results" / "accountant.json"
ORDERS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 256)
NUM_STEPS, NUM_ROWS, RATE, NOISE = 58_594, 35, 128 / 50_000, 1.0
TOLERANCES = {"icml2025": 1e-6, "corrected": 1e-3}
CASES = ("icml2025", "corrected", "streamed")
NUM_EXAMPLES, NUM_STREAMED = 50_000, 1_300_000


def make_ledger(num_examples: int) -> GradNormLedger:
    """A run whose norms span four decades between examples and fall over time."""
    rng = np.random.default_rng(0)
    base = rng.lognormal(-2, 1.2, num_examples).astype(np.float32)
    fall = np.geomspace(1.5, 0.5, NUM_ROWS)
    norms = np.empty((NUM_ROWS, num_examples), dtype=np.float32)
    for row, factor in zip(norms, fall, strict=True):
        row[:] = factor * base * rng.lognormal(0, 0.5, num_examples)
    steps = [round(NUM_STEPS * (i + 1) / NUM_ROWS) for i in range(NUM_ROWS)]
    return GradNormLedger(NoisySGD(NUM_STEPS, RATE, NOISE), steps, norms)


def seconds(task: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    task()
    return time.process_time() - start


def memory(field: str) -> float:
    """This process's memory now (``VmRSS``) or at its peak (``VmHWM``), MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def account(ledger: GradNormLedger, convention: str, tolerance: float) -> None:
    """Losses at all orders."""
    for order in ORDERS:
        privacy_losses(ledger, order, convention=convention, tolerance=tolerance)


def measure(case: str, num_examples: int, path: str) -> dict[str, float]:
    """Time and memory of one case in this process; ``path`` for the streamed one."""
    ledger = None if path else make_ledger(num_examples)
    warm = make_ledger(2)  # imports and page faults
    account(warm, "icml2025", 0.5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")

    def task() -> None:
        convention = "icml2025" if path else case
        tolerance = TOLERANCES[convention]
        parts = GradNormLedger.load_chunks(path) if path else [ledger]
        for part in parts:
            account(part, convention, tolerance)

    spent = seconds(task)
    values = num_examples * NUM_ROWS * len(ORDERS)
    return {
        "seconds": spent,
        "nanoseconds_per_value": 1e9 * spent / values,
        "mebibytes": memory("VmHWM") - before,
    }


def in_own_process(case: str, num_examples: int, path: str = "") -> dict[str, float]:
    """``measure`` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case, num_examples, path))


def errors(convention: str, num_examples: int) -> dict[str, float]:
    """Least and largest relative error of losses, and exact time for each value."""
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
    """Binomial weights and exponents of the printed sum, k = 0 … order."""
    k = np.arange(order + 1.0)
    binomials = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    weights = binomials + k * math.log(RATE) + (order - k) * math.log1p(-RATE)
    return weights, k * (k - 1) / 2


def peers(num_examples: int) -> dict[str, float]:
    """Seconds for each value of the printed sum, by numpy and by a loop over scipy."""
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


def compare(num_examples: int, num_streamed: int) -> dict[str, Any]:
    """Every case, the errors, and what others take for ``num_examples``, in seconds."""
    results = {c: in_own_process(c, num_examples) for c in TOLERANCES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        make_ledger(num_streamed).save(path)
        results["streamed"] = in_own_process("streamed", num_streamed, str(path))
    checked = {
        "icml2025": errors("icml2025", 4000),
        "corrected": errors("corrected", 2000),
    }
    values = num_examples * NUM_ROWS * len(ORDERS)
    others = {name: each * values for name, each in peers(512).items()}
    for name, row in checked.items():
        others[f"exact_{name}"] = row.pop("exact_seconds_per_value") * values
    return {"cases": results, "relative_errors": checked, "extrapolated_s": others}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-examples", type=int, default=NUM_EXAMPLES)
    parser.add_argument("--num-streamed", type=int, default=NUM_STREAMED)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    content = compare(options.num_examples, options.num_streamed)
    for case in CASES:
        row = content["cases"][case]
        print(
            f"{case:10} {row['seconds']:8.2f} s  {row['nanoseconds_per_value']:6.1f} "
            f"ns a value  {row['mebibytes']:6.0f} MiB"
        )
    for name, row in content["relative_errors"].items():
        print(f"{name:10} relative error {row['least']:.1e} … {row['largest']:.1e}")
    for name, spent in content["extrapolated_s"].items():
        print(
            f"{name:15} {spent:10.1f} s for {options.num_examples} examples (extrap.)"
        )
    settings = {"orders": ORDERS, "rows": NUM_ROWS, "updates": NUM_STEPS}
    settings |= {"sample_rate": RATE, "tolerances": TOLERANCES}
    settings |= {
        "num_examples": options.num_examples,
        "num_streamed": options.num_streamed,
    }
    write_json(
        options.out, {"settings": settings, "environment": environment(), **content}
    )


if __name__ == "__main__":
    main()
