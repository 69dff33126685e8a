"""The table: a line for each bar, with what was measured and whether it holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.common import report

HEAD = ("path", "bar", "measured", "range", "wall", "verdict", "beside it")


@dataclass(frozen=True)
class Row:
    """One bar.

    Args:
        path: What is measured.
        bar: The most it may be.
        measured: A number, or what ``timing.spread`` found by clock.
        beside: Peers, and what else belongs to it.
        form: How numbers are written.
    """

    path: str
    bar: float
    measured: float | dict[str, Any]
    beside: str = ""
    form: str = ".3f"

    @property
    def value(self) -> float:
        """The number that is held against the bar."""
        if isinstance(self.measured, dict):
            return float(self.measured["busy"]["ratio"])
        return self.measured

    @property
    def verdict(self) -> str:
        """Whether the bar holds, or by how much it is missed."""
        if self.value <= self.bar:
            return "holds"
        over = 100 * (self.value / self.bar - 1)
        return f"missed by {self.value - self.bar:{self.form}} ({over:.1f} %)"

    def cells(self) -> tuple[str, ...]:
        """As text."""
        between, wall = "", ""
        if isinstance(self.measured, dict):
            low, high = self.measured["busy"]["range"]
            between = f"{low:.2f}–{high:.2f}"
            wall = f"{self.measured['wall']['ratio']:{self.form}}"
        bar, value = f"≤ {self.bar:g}", f"{self.value:{self.form}}"
        return self.path, bar, value, between, wall, self.verdict, self.beside


def markdown(rows: Iterable[Row]) -> str:
    """The table, for people and for a file."""
    return report.markdown([HEAD, *(row.cells() for row in rows)])
