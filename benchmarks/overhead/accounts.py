"""The rows of ``benchmarks.accountant``."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks import accountant
from benchmarks.overhead.table import Row

CASES = ["50,000 examples"]
_SHOWN = "35 checkpoints × 10 orders"


def measure(case: str) -> dict[str, Any]:
    """Everything that ``benchmarks.accountant`` measures."""
    return accountant.compare(accountant.NUM_EXAMPLES, accountant.NUM_STREAMED)


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """The table's lines."""
    for case, result in found.items():
        spent, errors = result["cases"], result["relative_errors"]
        others = result["extrapolated_s"].items()
        shown = "; ".join(f"{name} {value:.0f} s" for name, value in others)
        for name, seconds, error in (("icml2025", 3, 1e-6), ("corrected", 6, 1e-3)):
            path = f"accountant, {name}, {case} × {_SHOWN}"
            own = spent[name]
            yield Row(f"{path}: seconds", seconds, own["seconds"], shown, ".2f")
            if name == "icml2025":
                yield Row(f"{path}: MiB", 200, own["mebibytes"], form=".0f")
            largest, least = errors[name]["largest"], errors[name]["least"]
            worst = largest if least >= 0 else math.inf
            beside = f"least {least:.1e}: never below the exact value"
            yield Row(f"{path}: relative error", error, worst, beside, form=".1e")
        streamed = spent["streamed"]
        path = f"accountant, 1,300,000 examples × {_SHOWN} from a file, in parts"
        value = streamed["nanoseconds_per_value"]
        yield Row(f"{path}: ns a value", 30, value, form=".1f")
        yield Row(f"{path}: MiB over the start", 100, streamed["mebibytes"], form=".0f")
