"""Verdicts on the paper's claims, and the numbers they quote, in words."""

from dataclasses import dataclass

import numpy as np

from benchmarks.common.report import rank_correlation
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

BORNE_OUT = "borne out"
NOT_BORNE_OUT = "not borne out"
NOT_TESTABLE = "not testable at this scale"


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about a claim.

    Attributes:
        verdict: ``BORNE_OUT``, ``NOT_BORNE_OUT`` or ``NOT_TESTABLE``.
        because: One sentence with the numbers.
    """

    verdict: str
    because: str


def ordering(times: np.ndarray) -> Verdict:
    """Do harder sets take longer? By the 95 % interval of Spearman's rho over seeds.

    Args:
        times: Times to unlearn, ``(seeds, sets)``, easiest set first; inf: never.
    """
    found = rank_correlation(times)
    if found["rho"] is None:
        return Verdict(NOT_TESTABLE, "all sets are equal in every seed")
    low, high = found["interval"]
    if low is None:
        because = f"in all seeds but one every set ties; there rho {found['rho']:.2f}"
        return Verdict(NOT_TESTABLE, because)
    seeds, rho = found["num_seeds"], f"Spearman {found['rho']:.2f}"
    numbers = f"{rho}, 95 % [{low:.2f}, {high:.2f}], over {seeds} seeds"
    if f"{low:.4f}" == f"{high:.4f}":  # an interval of no width would say too much
        numbers = f"{rho} in each of {seeds} seeds"
    ties = f"{100 * found['tied_pairs']:.0f} % of pairs tie"
    return Verdict(of_interval(low, high), f"{numbers}; {ties}")


def medians_text(times: np.ndarray) -> str:
    """The median time of each set over the seeds, easiest first, in words."""
    middle = np.quantile(times, 0.5, axis=0, method="higher")
    return ", ".join(f"{time:g}" if np.isfinite(time) else "never" for time in middle)


def text_of(found: ConfidenceInterval, digits: int = 3) -> str:
    """An estimate with the ends of its interval, in words."""
    middle, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} [{low}, {high}]"


def epochs_text(times: np.ndarray, most: float) -> str:
    """Times in words; never counts as the most, and is said."""
    never = int(np.isinf(times).sum())
    text = interval_text(np.minimum(times, most), 1)
    return f"{text}, never ×{never}" if never else text


def interval_text(values: np.ndarray, digits: int = 3) -> str:
    """Mean and half the width of its 95 % interval."""
    found = mean_interval(values)
    if not np.isfinite(found.high):
        return f"{found.estimate:.{digits}f}"
    return f"{found.estimate:.{digits}f} ± {found.high - found.estimate:.{digits}f}"


def of_interval(low: float, high: float) -> str:
    """Borne out above 0, not borne out below, else nothing: also if all is 0."""
    if low > 0:
        return BORNE_OUT
    return NOT_BORNE_OUT if low < 0 and high <= 0 else NOT_TESTABLE


def combined(verdicts: dict[str, Verdict]) -> Verdict:
    """One verdict over several measures: borne out only where all of them are."""
    because = "; ".join(
        f"{name}: {one.verdict} ({one.because})" for name, one in verdicts.items()
    )
    return Verdict(all_of([one.verdict for one in verdicts.values()]), because)


def all_of(kinds: list[str]) -> str:
    """Borne out if all are, not borne out if one is not, else not testable."""
    if all(kind == BORNE_OUT for kind in kinds):
        return BORNE_OUT
    return NOT_BORNE_OUT if NOT_BORNE_OUT in kinds else NOT_TESTABLE
