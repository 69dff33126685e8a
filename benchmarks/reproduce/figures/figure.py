"""What every figure has, and the verdict on the paper's claim."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.figures.verdicts import Verdict
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace

Result = dict[str, Any]


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
    result: Callable[[Scale, Workspace], Result]
    judge: Callable[[Result], Verdict]
    draw: Callable[[Result], Picture]
    table: Callable[[Result], str] | None = None
