"""The effect that a judge measured: its size, interval and p-value, and their text.

The tables of the page of results, the JSON of a figure and the text for the terminal
are all made of these fields.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Effect:
    """A measured effect.

    Attributes:
        name: What was measured, as a noun phrase.
        estimate: Its value.
        low: Lower end of the two-sided 95 % interval; None if only an upper limit is
            tested.
        high: Upper end, or the one-sided 97.5 % limit.
        limit: The value that it is compared with.
        p: One-sided p-value over sets or classes, None if there is none.
        side: On which side of the limit the p-value is: ``"above"`` or ``"below"``.
        p_trainings: That over trainings, if it is another test.
        units: What the test draws, with its number, such as ``"20 sets"``.
        trainings: Number of trainings.
        digits: Decimal places of the text.
    """

    name: str
    estimate: float
    low: float | None
    high: float
    limit: float = 0.0
    p: float | None = None
    side: str = ""
    p_trainings: float | None = None
    units: str = ""
    trainings: int = 0
    digits: int = 2

    def value(self) -> str:
        """Return the estimate with its interval, or with its limit and the margin."""
        numbers = self.estimate, self.low, self.high, self.limit
        middle, low, high, limit = (
            "" if one is None else f"{one:.{self.digits}f}" for one in numbers
        )
        if not low:
            return f"{middle}, at most {high} (allowed: {limit})"
        return f"{middle} [{low}, {high}]"

    def p_value(self) -> str:
        """Return the p-values with their side; empty if there are none."""
        if self.p is None:
            return ""
        text = f"{self.side} {self.limit:g}: {_shown(self.p)}"
        if self.p_trainings is None:
            return text
        return f"{text} over sets, {_shown(self.p_trainings)} over trainings"

    def counted(self) -> str:
        """Return the numbers of sets and of trainings."""
        return f"{self.units}, {self.trainings} trainings"

    def text(self) -> str:
        """Return everything in one line."""
        p = f"one-sided p {found}" if (found := self.p_value()) else ""
        parts = f"{self.name}: {self.value()}", p, self.counted()
        return "; ".join(filter(None, parts))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON, numbers with six digits."""
        return {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def _shown(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
