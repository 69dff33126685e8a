"""How many swept rows is a smoothed row worth?

    python -m benchmarks.swept_rows

A sweep measures every example, but only at a few updates. Rule "right" holds each row's
norms for all updates since the row before. Rule "smoothed" holds them for one update,
and charges the others the mean loss over the norms that are plausible given all rows.

DP-SGD on digits (MLP, clipped at 1, 3 and 10) with the norms of all examples at every
update. The losses of 35 rows under each rule are compared with the exact ones (plain
sums over the updates). The error is the root mean square of ln(loss / exact loss). The
last column is the number of rows at which "right" has the error of 35 rows under the
other rule, interpolated geometrically between the numbers that were measured.

Results are stored in ``benchmarks/results/swept_rows.json`` after every seed, and
stored seeds are not run again. The table is written beside this file.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, over_seeds, publish, run_missing
from benchmarks.observed_vs_exact import (
    CASES,
    ORDERS,
    PLAIN,
    Case,
    compare,
    ledgers,
    thinned,
)
from opacus_pi import GradNormLedger
from opacus_pi.accounting import privacy_losses

NAMES = tuple(name for name in CASES if name.startswith("digits"))
NUM_ROWS = 35  # as in the paper
RULES = ("right", "trapezoid", "smoothed")
COUNTS = (18, 25, 35, 50, 70, 100, 140, 200)  # at which "right" is measured
OUT = Path("benchmarks/results/swept_rows.json")


def settings_of(case: Case) -> dict[str, Any]:
    """Return what determines the results of a case, but for the seed."""
    return {**case.settings(), "rows": NUM_ROWS, "rules": RULES, "counts": COUNTS}


def error(losses: np.ndarray, exact: np.ndarray) -> float:
    """Return the root mean square of the logarithm of the ratio."""
    return float(np.sqrt(np.mean(np.log(losses / exact) ** 2)))


def equivalent(wanted: float, counts: list[int], errors: list[float]) -> float:
    """Return at which number of rows the error falls to the wanted one.

    Args:
        wanted: An error.
        counts: Numbers of rows, ascending.
        errors: The error at each.

    Returns:
        Between the first and the last number; one of these if the error is outside.
    """
    # More rows may by chance have a larger error; such numbers are left out.
    least = np.minimum.accumulate([np.inf, *errors])
    places = np.flatnonzero(np.diff(least) < 0)
    at, rows = np.log(errors)[places], np.log(counts)[places]
    found = np.interp(-np.log(wanted), -at, rows)
    return float(np.exp(found))


def compared(exact: GradNormLedger) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by order and rule, what ``compare`` does, error and equivalent rows."""
    counts = [count for count in COUNTS if count < exact.num_rows]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for order in ORDERS:
        ask = partial(privacy_losses, order=order, **PLAIN)
        truth = ask(exact)
        errors = [error(ask(thinned(exact, count)), truth) for count in counts]
        rules = {}
        for rule in RULES:
            losses = ask(thinned(exact, NUM_ROWS), rule=rule)
            own = error(losses, truth)
            rules[rule] = {
                **compare(losses, truth),
                "error": own,
                "worth": equivalent(own, counts, errors),
            }
        found[f"order {order:g}"] = rules
    return found


def table(cases: dict[str, Any]) -> str:
    """Return a Markdown table of all cases."""
    keys = {
        "spearman": "Spearman",
        "min_ratio": "least ratio",
        "tenth_ratio": "10 %",
        "upper_ratio": "99 %",
        "total_ratio": "total",
        "error": "error",
        "worth": 'rows of "right" with this error',
    }
    rows = [["training", "seeds", "of", "rule", *keys.values()]]
    for name, case in cases.items():
        seeds = list(case["seeds"].values())
        for asked in seeds[0]:
            for rule in seeds[0][asked]:
                one = [seed[asked][rule] for seed in seeds]
                cells = [over_seeds(seed[key] for seed in one) for key in keys]
                rows.append([name, str(len(seeds)), asked, rule, *cells])
    return (
        "# What a smoothed row is worth\n\n"
        f"Made by `python -m benchmarks.swept_rows`: {NUM_ROWS} swept rows under three "
        "rules, against exact norms at every update; mean over seeds [least, largest]. "
        "A ratio below 1 charges an example too little; 10 %: a tenth of the examples "
        "has a smaller ratio. Error: root mean square of ln(loss / exact loss).\n\n"
        f"{markdown(rows)}\n"
    )


def main() -> None:
    """Run the missing seeds, print the table, and write both files."""
    parser = parser_of("benchmarks.swept_rows", __doc__)
    add_options(parser, NAMES, OUT)
    args = parser.parse_args()
    images = cache(lambda: data.load("digits"))

    def measure(name: str, seed: int) -> dict[str, Any]:
        return compared(ledgers(CASES[name], images(), seed)[1])

    settings = {name: settings_of(CASES[name]) for name in args.cases}
    publish(args.out, table(run_missing(args.out, settings, args.seeds, measure)))


if __name__ == "__main__":
    main()
