"""Beyond the paper: every unlearning method against the difficulty of the forget set.

Data, model, seeds and strata as in Figure 1 (middle). For each method (its settings
found once on a random forget set) and stratum: epochs to unlearn by UA and by MIA, UA
and MIA at the end beside the oracles', test accuracy lost, and the loss barrier to an
oracle before and after, beside that between oracles.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce.barrier_units import BarrierBaseline, BarrierBefore
from benchmarks.reproduce.figures import outcomes
from benchmarks.reproduce.figures.fig1 import draw_panels, panel
from benchmarks.reproduce.figures.figure import (
    Figure,
    Result,
    Verdict,
    joined,
    ordering,
)
from benchmarks.reproduce.forget import STRATA, strata
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.methods import METHODS
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.unlearning_units import Search
from opacus_pi.evaluation.intervals import mean_interval

NAMES = [name for name, method in METHODS.items() if method.ranges]
COLUMNS = {
    "UA": outcomes.UA,
    "MIA": outcomes.MIA,
    "RA": "retain_accuracy",
    "TA": "test_accuracy",
}


def _units(scale: Scale) -> list[Unit]:
    experiment, sets = scale.sgd, strata(scale.sgd)
    seeds = range(experiment.num_seeds)
    runs = [u for name in NAMES for u in outcomes.unlearnings(experiment, sets, name)]
    before = [BarrierBefore(experiment, one, s) for s in seeds for one in sets]
    return [*runs, *before, *(BarrierBaseline(experiment, one) for one in sets)]


def _result(scale: Scale, lab: Lab) -> Result:
    experiment, sets = scale.sgd, strata(scale.sgd)
    seeds = range(experiment.num_seeds)
    return {
        "panels": {name: panel(lab, experiment, name, sets) for name in NAMES},
        "settings": {
            name: Search(experiment, name).run(lab)["settings"] for name in NAMES
        },
        "rows": {name: _rows(scale, lab, name) for name in NAMES},
        "oracles": [outcomes.oracle_values(lab, experiment, one) for one in sets],
        "before": [
            [BarrierBefore(experiment, one, seed).run(lab) for one in sets]
            for seed in seeds
        ],
        "baseline": [BarrierBaseline(experiment, one).run(lab) for one in sets],
    }


def _rows(scale: Scale, lab: Lab, method: str) -> dict[str, Any]:
    """Numbers of one method before the first and after the last epoch, by seed."""
    rows = outcomes.runs(lab, scale.sgd, strata(scale.sgd), method)

    def column(value: Any) -> list[list[float]]:
        return [[value(run) for run in row] for row in rows]

    found = {"barrier after": column(lambda run: run["barrier_after"])}
    for name, metric in COLUMNS.items():
        found[f"{name} before"] = column(lambda run, m=metric: run["trace"][m][0])
        found[f"{name} after"] = column(lambda run, m=metric: run["trace"][m][-1])
    return found


def _judge(result: Result) -> Verdict:
    return joined(
        {
            name: ordering(outcomes.array(found["times"]["UA"]))
            for name, found in result["panels"].items()
        }
    )


def _draw(result: Result) -> Picture:
    return draw_panels(result["panels"])


def _table(result: Result) -> str:
    """Markdown: one line a method and stratum, mean and 95 % interval over seeds."""
    header = [
        "method",
        "stratum",
        "epochs by UA",
        "epochs by MIA",
        "UA before → after (oracle)",
        "MIA before → after (oracle)",
        "TA before → after (oracle)",
        "barrier before → after (between oracles)",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in NAMES:
        for number, stratum in enumerate(STRATA):
            cells = [method, stratum, *_cells(result, method, number)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(result: Result, method: str, number: int) -> list[str]:
    """The numbers of one method and stratum."""
    found, rows = result["panels"][method], result["rows"][method]
    times = [outcomes.array(found["times"][name])[:, number] for name in ("UA", "MIA")]
    cells = [epochs(one, found["max_time"]) for one in times]
    for name in ("UA", "MIA", "TA"):
        before, after = (
            interval(np.array(rows[f"{name} {when}"])[:, number])
            for when in ("before", "after")
        )
        oracle = np.mean(result["oracles"][number][COLUMNS[name]])
        cells.append(f"{before} → {after} ({oracle:.3f})")
    before = interval(np.array(result["before"])[:, number])
    after = interval(np.array(rows["barrier after"])[:, number])
    cells.append(f"{before} → {after} ({np.mean(result['baseline'][number]):.3f})")
    return cells


def epochs(times: np.ndarray, most: float) -> str:
    """Times in words; never counts as the most, and is said."""
    never = int(np.isinf(times).sum())
    text = interval(np.minimum(times, most), 1)
    return f"{text}, never ×{never}" if never else text


def interval(values: np.ndarray, digits: int = 3) -> str:
    """Mean and half the width of its 95 % interval."""
    found = mean_interval(values)
    if not np.isfinite(found.high):
        return f"{found.estimate:.{digits}f}"
    return f"{found.estimate:.{digits}f} ± {found.high - found.estimate:.{digits}f}"


FIGURES = [
    Figure(
        "methods",
        "The privacy loss predicts difficulty for every unlearning method, not only "
        "for fine-tuning.",
        _units,
        _result,
        _judge,
        _draw,
        _table,
    )
]
