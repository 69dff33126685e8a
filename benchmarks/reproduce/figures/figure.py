"""What every figure has, and the verdict on the paper's claim."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.report import rank_correlation
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit

Result = dict[str, Any]
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


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, or beyond it.

    Attributes:
        name: What the command line calls it.
        claim: The paper's claim in one sentence.
        units: The jobs it needs at a scale.
        result: Its numbers, JSON, from the finished jobs.
        judge: The verdict on the claim.
        draw: The picture of a result.
        table: A table of a result in Markdown, if it has one.
    """

    name: str
    claim: str
    units: Callable[[Scale], list[Unit]]
    result: Callable[[Scale, Lab], Result]
    judge: Callable[[Result], Verdict]
    draw: Callable[[Result], Picture]
    table: Callable[[Result], str] | None = None


def ordering(times: np.ndarray) -> Verdict:
    """Do harder sets take longer? By the 95 % interval of Spearman's rho over seeds.

    Args:
        times: Times to unlearn, ``(seeds, sets)``, easiest set first; inf: never.
    """
    found = rank_correlation(times)
    if found["rho"] is None:
        return Verdict(NOT_TESTABLE, "every set took equally long in every seed")
    low, high = found["interval"]
    if low is None:
        because = f"in all seeds but one every set ties; there rho {found['rho']:.2f}"
        return Verdict(NOT_TESTABLE, because)
    because = (
        f"Spearman {found['rho']:.2f}, 95 % [{low:.2f}, {high:.2f}], over "
        f"{found['num_seeds']} seeds; {100 * found['tied_pairs']:.0f} % of pairs tie"
    )
    return Verdict(of_interval(low, high), because)


def of_interval(low: float, high: float) -> str:
    """Borne out above 0, not borne out below, else nothing: also if all is 0."""
    if low > 0:
        return BORNE_OUT
    return NOT_BORNE_OUT if low < 0 and high <= 0 else NOT_TESTABLE


def joined(verdicts: dict[str, Verdict]) -> Verdict:
    """One verdict over several measures: borne out only where all of them are."""
    kinds = [one.verdict for one in verdicts.values()]
    because = "; ".join(
        f"{name}: {one.verdict} ({one.because})" for name, one in verdicts.items()
    )
    if all(kind == BORNE_OUT for kind in kinds):
        return Verdict(BORNE_OUT, because)
    if NOT_BORNE_OUT in kinds:
        return Verdict(NOT_BORNE_OUT, because)
    return Verdict(NOT_TESTABLE, because)
