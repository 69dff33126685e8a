"""Verdicts on the paper's claims, and the numbers that they quote, as text.

Every claim is reduced to quantities that must be above 0, one value per seed. It is
borne out if the 95 % interval of the mean is above 0, not borne out if it is below, and
not testable if it contains 0. A claim with several parts is borne out only if all are.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.common.report import rank_correlation
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

BORNE_OUT = "borne out"
NOT_BORNE_OUT = "not borne out"
NOT_TESTABLE = "not testable at this scale"


@dataclass(frozen=True)
class Verdict:
    """Whether the numbers confirm a claim.

    Attributes:
        verdict: ``BORNE_OUT``, ``NOT_BORNE_OUT`` or ``NOT_TESTABLE``; empty for a
            remark, which does not count.
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


def ordering(times: np.ndarray) -> Verdict:
    """Decide whether harder sets take longer, by Spearman's rho over seeds.

    Args:
        times: Times to unlearn, ``(seeds, sets)``, easiest set first; inf: never.
    """
    found = rank_correlation(times)
    if found["rho"] is None:
        return Verdict(NOT_TESTABLE, "all sets tie in every seed")
    low, high = found["interval"]
    if low is None:
        because = f"all sets tie in all seeds but one, where rho is {found['rho']:.2f}"
        return Verdict(NOT_TESTABLE, because)
    seeds, rho = found["num_seeds"], f"Spearman {found['rho']:.2f}"
    numbers = f"{rho}, 95 % [{low:.2f}, {high:.2f}], over {seeds} seeds"
    if f"{low:.4f}" == f"{high:.4f}":  # an interval of width 0 would claim too much
        numbers = f"{rho} in each of {seeds} seeds"
    ties = f"{100 * found['tied_pairs']:.0f} % of pairs tie"
    return Verdict(of_interval(low, high), f"{numbers}; {ties}")


def medians_text(times: np.ndarray) -> str:
    """Return the median time of each set over the seeds, easiest first, as text."""
    middle = np.quantile(times, 0.5, axis=0, method="higher")
    return ", ".join(f"{time:g}" if np.isfinite(time) else "never" for time in middle)


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
    """Return the verdict on "above 0": borne out, not borne out or not testable.

    An interval that is the point 0 is not testable either.
    """
    if low > 0:
        return BORNE_OUT
    return NOT_BORNE_OUT if low < 0 and high <= 0 else NOT_TESTABLE


def combined(verdicts: dict[str, Verdict]) -> Verdict:
    """Return one verdict over several parts: borne out only if all of them are."""
    kind = all_of([one.verdict for one in verdicts.values()])
    return Verdict(kind, parts=verdicts)


def with_remark(verdict: Verdict, name: str, text: str) -> Verdict:
    """Return a verdict with a further part that does not count."""
    return replace(verdict, parts=verdict.parts | {name: Verdict("", text)})


def all_of(kinds: list[str]) -> str:
    """Return borne out if all are, not borne out if one is not, else not testable."""
    if all(kind == BORNE_OUT for kind in kinds):
        return BORNE_OUT
    return NOT_BORNE_OUT if NOT_BORNE_OUT in kinds else NOT_TESTABLE
