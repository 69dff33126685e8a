"""What every figure consists of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.judging.verdicts import Verdict
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace

Result = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, or one beyond it.

    The four functions are called in this order: ``units``, then ``result`` when all
    units have been run, then ``judge`` and ``draw``, which need the result only.

    Attributes:
        name: Its name on the command line.
        claim: The claim in one sentence; one beyond the paper says so.
        units: Returns the jobs that it needs at a scale.
        result: Returns its numbers, as JSON, from the stored results of the jobs.
        judge: Returns the verdict on the claim.
        draw: Draws a result.
        table: Returns a Markdown table of a result; None for some figures.
        note: What is measured and drawn, and what limits it. It stands under the claim.
            Empty for pictures that show set by set what the page explains once.
    """

    name: str
    claim: str
    units: Callable[[Scale], list[Unit]]
    result: Callable[[Scale, Workspace], Result]
    judge: Callable[[Result], Verdict]
    draw: Callable[[Result], Picture]
    table: Callable[[Result], str] | None = None
    note: str = ""
