"""The table: one row per target, with the measured value and whether it is met."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.common import report

HEAD = (
    "quantity",
    "target",
    "measured",
    "range",
    "wall clock",
    "verdict",
    "for comparison",
)


@dataclass(frozen=True)
class Row:
    """A measured quantity and its target.

    Attributes:
        quantity: What is measured.
        target: The largest value that is accepted.
        measured: A number, or what ``timing.spread`` returned for each clock.
        comparison: Values of other libraries and further remarks.
        form: Format of the numbers.
    """

    quantity: str
    target: float
    measured: float | dict[str, Any]
    comparison: str = ""
    form: str = ".3f"

    @property
    def value(self) -> float:
        """The number that is compared with the target."""
        if isinstance(self.measured, dict):
            return float(self.measured["busy"]["ratio"])
        return self.measured

    @property
    def verdict(self) -> str:
        """Whether the target is met, or by how much it is missed."""
        if self.value <= self.target:
            return "holds"
        over = 100 * (self.value / self.target - 1)
        return f"missed by {self.value - self.target:{self.form}} ({over:.1f} %)"

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of ``HEAD``."""
        between, wall = "", ""
        if isinstance(self.measured, dict):
            low, high = self.measured["busy"]["range"]
            between = f"{low:.2f}–{high:.2f}"
            wall = f"{self.measured['wall']['ratio']:{self.form}}"
        target, value = f"≤ {self.target:g}", f"{self.value:{self.form}}"
        return (
            self.quantity,
            target,
            value,
            between,
            wall,
            self.verdict,
            self.comparison,
        )


def markdown(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    return report.markdown([HEAD, *(row.cells() for row in rows)])
