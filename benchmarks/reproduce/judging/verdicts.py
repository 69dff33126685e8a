"""Verdicts on the paper's claims, and the numbers that they quote, as text.

A claim is *borne out* or *not borne out* if a test with a small error probability says
so. It is *undecided* if the test was made and both answers remain possible, and *not
testable yet* if the numbers cannot answer it, for example because nothing was
unlearned, or because one of them is not finite. A claim with several parts is borne out
only if all of them are.

A claim about numbers that follow from constants, such as a bound, is not judged:
nothing in it is random, so no test applies. It is *computed*, and holds or does not.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

BORNE_OUT = "borne out"
NOT_BORNE_OUT = "not borne out"
UNDECIDED = "undecided"
NOT_TESTABLE = "not testable yet"
HOLDS = "computed: holds"
DOES_NOT_HOLD = "computed: does not hold"
COMPUTED = (HOLDS, DOES_NOT_HOLD)


@dataclass(frozen=True)
class Verdict:
    """Whether the numbers confirm a claim.

    Attributes:
        verdict: ``BORNE_OUT``, ``NOT_BORNE_OUT``, ``UNDECIDED`` or ``NOT_TESTABLE``;
            ``HOLDS`` or ``DOES_NOT_HOLD`` if it was computed; empty for a remark, which
            does not count.
        reason: The numbers behind it, in one sentence.
        parts: The verdicts on the parts of the claim, by name.
    """

    verdict: str
    reason: str = ""
    parts: dict[str, "Verdict"] = field(default_factory=dict)

    @property
    def because(self) -> str:
        """The reason and those of all parts, in one line."""
        parts = (
            f"{name}: {one.verdict} ({one.because})"
            if one.verdict
            else f"{name}: {one.because}"
            for name, one in self.parts.items()
        )
        return "; ".join(text for text in (self.reason, *parts) if text)

    def lines(self) -> list[str]:
        """Return the parts as a nested list in Markdown, an item per line."""
        found = []
        for name, one in self.parts.items():
            found.append(f"- **{name}**: {sentences(one.verdict, one.reason)}")
            found += [f"    {line}" for line in one.lines()]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return verdict, reason and parts as JSON."""
        found: dict[str, Any] = {"verdict": self.verdict, "because": self.reason}
        if self.parts:
            found["parts"] = {name: one.to_json() for name, one in self.parts.items()}
        return found

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Verdict":
        """Return what ``to_json`` stored; other entries are ignored."""
        parts = content.get("parts", {}).items()
        return Verdict(
            content["verdict"],
            content["because"],
            {name: Verdict.from_json(one) for name, one in parts},
        )


def not_finite(named: dict[str, ArrayLike]) -> str:
    """Return which values are missing, NaN or infinite; empty if all are numbers.

    Comparisons with NaN are false, so that a guard or a count would pass over it.

    Args:
        named: Values by the name that the text gives them.
    """
    for name, values in named.items():
        array = np.asarray(values, dtype=np.float64)
        bad = int((~np.isfinite(array)).sum())
        if bad:
            return f"{name}: {bad} of {array.size} values are NaN or infinite"
        if not array.size:
            return f"{name}: there is no value"
    return ""


def sentences(*texts: str) -> str:
    """Return texts as sentences; empty ones are left out, and symbols stay small.

    >>> sentences("borne out", "", "ε = 3.3")
    'Borne out. ε = 3.3.'
    """
    found = []
    for text in filter(None, texts):
        first = text[0].upper() if text[0].isascii() else text[0]
        found.append(f"{first}{text[1:]}.")
    return " ".join(found)


def text_of(found: ConfidenceInterval, digits: int = 3) -> str:
    """Return an estimate with the ends of its interval, as text."""
    middle, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} [{low}, {high}]"


def epochs_text(times: np.ndarray, most: float) -> str:
    """Return mean time and interval as text.

    Args:
        times: Epochs; ``inf`` is never.
        most: Epochs of a run; used in place of never, whose number is given.
    """
    never = int(np.isinf(times).sum())
    text = interval_text(np.minimum(times, most), 1)
    return f"{text}, never ×{never}" if never else text


def interval_text(values: np.ndarray, digits: int = 3) -> str:
    """Return the mean and half the width of its 95 % interval, as text.

    Args:
        values: One value per seed.
        digits: Decimal places; fewer if the half width needs fewer for two digits.
    """
    found = mean_interval(values)
    if not np.isfinite(found.high):
        return f"{found.estimate:.{digits}f}"
    half = found.high - found.estimate
    if half >= 1e-9:
        digits = min(digits, max(0, 1 - int(np.floor(np.log10(half)))))
    return f"{found.estimate:.{digits}f} ± {half:.{digits}f}"


def of_interval(low: float, high: float) -> str:
    """Return the verdict on "above 0".

    An interval that is the point 0 decides nothing, nor does one that ends at 0.
    """
    if low > 0:
        return BORNE_OUT
    return NOT_BORNE_OUT if high < 0 else UNDECIDED


def combined(verdicts: dict[str, Verdict]) -> Verdict:
    """Return one verdict over several parts: borne out only if all of them are."""
    kind = all_of([one.verdict for one in verdicts.values()])
    return Verdict(kind, parts=verdicts)


def with_remark(verdict: Verdict, name: str, text: str) -> Verdict:
    """Return a verdict with a further part that does not count."""
    return replace(verdict, parts=verdict.parts | {name: Verdict("", text)})


def all_of(kinds: list[str]) -> str:
    """Return the verdict on a claim from the verdicts on its parts.

    One part that is not borne out decides. Else one part that cannot be tested leaves
    the claim untested, and one that is undecided leaves it undecided.
    """
    for kind in (NOT_BORNE_OUT, NOT_TESTABLE, UNDECIDED):
        if kind in kinds:
            return kind
    return BORNE_OUT
