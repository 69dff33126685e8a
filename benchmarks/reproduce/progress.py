"""What a study still has to do, and how long it will take."""

from collections.abc import Iterable

import numpy as np

from benchmarks.common.report import markdown
from benchmarks.reproduce.pool import stages
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace


def plan(units: Iterable[Unit], workspace: Workspace) -> str:
    """Return a table of the jobs by kind: how many, how many are done, hours left.

    Hours are estimated from the seconds of the finished jobs of the same kind; they
    depend on how busy the machine was.

    Args:
        units: The jobs whose results are wanted.
        workspace: Where results are stored.
    """
    kinds: dict[str, list[Unit]] = {}
    for stage in stages(units):
        for unit in stage:
            kinds.setdefault(unit.kind(), []).append(unit)
    rows = [["jobs", "in all", "done", "minutes each", "core-hours left"]]
    total, unknown = 0.0, False
    for kind, some in kinds.items():
        seconds = [one for unit in some if (one := unit.seconds(workspace)) is not None]
        row = [kind, str(len(some)), str(len(seconds))]
        if seconds:
            each = float(np.mean(seconds))
            hours = each * (len(some) - len(seconds)) / 3600
            total += hours
            rows.append([*row, f"{each / 60:.1f}", f"{hours:.1f}"])
        else:
            unknown = True
            rows.append([*row, "not measured", "not measured"])
    more = " and those not measured yet" if unknown else ""
    return f"{markdown(rows)}\n\n{total:.1f} core-hours left{more}.\n"
