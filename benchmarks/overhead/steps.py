"""The rows of ``benchmarks.fast_step``: one backward pass, clipping and tracking."""

from collections.abc import Iterator
from typing import Any

from benchmarks import fast_step
from benchmarks.overhead.table import Row

CASES = list(fast_step.CASES)


def measure(case: str, device: str = "cpu") -> dict[str, Any]:
    """One model's step."""
    return fast_step.compare(case, fast_step.ROUNDS, device)


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """The table's lines."""
    for case, step in found.items():
        model, batch_size = case.rsplit("-", 1)
        spent = step["busy"]["milliseconds"].items()
        shown = ", ".join(f"{mode} {value:.1f}" for mode, value in spent)
        beside = (
            f"better mode: {step['busy']['better']}; ms: {shown}; updates differ by "
            f"{step['update_relative_difference']:.0e}"
        )
        path = (
            f'tracked step, mode "fast", over Opacus\'s better, {model} B={batch_size}'
        )
        yield Row(path, fast_step.BARS[model], step, beside)
