"""Beyond the paper: every unlearning method against the difficulty of the forget set.

Claim: with every method harder sets take longer, and the hardest set takes longest.

Data, model, seeds and strata are those of figure 1 (middle). Settings: searched once
for each method, on a random forget set. For each method and stratum the result has:
epochs to unlearn by UA and by MIA; UA and MIA at the end, beside the oracles'; test
accuracy; and the loss barrier to the oracles (modulo permutation, as in
``loss_barriers``) before and after, beside the barrier between oracles. A set that is
at the oracle before unlearning counts as 0 epochs, even if the method moves it away
afterwards. So read the times together with the metrics at the end.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from benchmarks.reproduce import outcomes
from benchmarks.reproduce.figures.figure import Figure, Result
from benchmarks.reproduce.figures.loss_barriers import (
    afters,
    baselines,
    befores,
    between_oracles,
    by_examples,
)
from benchmarks.reproduce.figures.times_to_unlearn import (
    draw_panels,
    judge_times,
    panel,
)
from benchmarks.reproduce.figures.verdicts import (
    Verdict,
    combined,
    epochs_text,
    interval_text,
    of_interval,
    text_of,
)
from benchmarks.reproduce.forget_sets import STRATA, strata
from benchmarks.reproduce.methods import METHODS
from benchmarks.reproduce.scales import Scale
from benchmarks.reproduce.units import Search, Unit
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation.intervals import mean_interval

NAMES = [name for name, method in METHODS.items() if method.ranges]
JUDGED = "training images"  # on which the barriers of the table are measured
TOLERATED = 0.05  # loss of test accuracy that is not mentioned
COLUMNS = {
    "UA": outcomes.UA,
    "MIA": outcomes.MIA,
    "RA": "retain_accuracy",
    "TA": "test_accuracy",
}


def _units(scale: Scale) -> list[Unit]:
    experiment, sets = scale.sgd, strata(scale.sgd)
    runs = [u for name in NAMES for u in outcomes.unlearnings(experiment, sets, name)]
    rows = [row for name in NAMES for row in afters(experiment, name)]
    barriers = [unit for row in [*befores(experiment), *rows] for unit in row]
    return [*runs, *barriers, *baselines(experiment)]


def _result(scale: Scale, workspace: Workspace) -> Result:
    experiment, sets = scale.sgd, strata(scale.sgd)
    return {
        "panels": {name: panel(workspace, experiment, name, sets) for name in NAMES},
        "settings": {
            name: Search(experiment, name).run(workspace)["settings"] for name in NAMES
        },
        "rows": {name: _rows(scale, workspace, name) for name in NAMES},
        "oracles": [outcomes.oracle_values(workspace, experiment, one) for one in sets],
        "before": by_examples(workspace, befores(experiment))[JUDGED],
        "baseline": between_oracles(workspace, baselines(experiment))[JUDGED],
    }


def _rows(scale: Scale, workspace: Workspace, method: str) -> dict[str, Any]:
    """Return a method's numbers before the first and after the last epoch, by seed."""
    rows = outcomes.runs(workspace, scale.sgd, strata(scale.sgd), method)

    def column(value: Any) -> list[list[float]]:
        return [[value(run) for run in row] for row in rows]

    after = by_examples(workspace, afters(scale.sgd, method))[JUDGED]
    found: dict[str, Any] = {"barrier after": after}
    for name, metric in COLUMNS.items():
        found[f"{name} before"] = column(lambda run, m=metric: run["trace"][m][0])
        found[f"{name} after"] = column(lambda run, m=metric: run["trace"][m][-1])
    return found


def _judge(result: Result) -> Verdict:
    found: dict[str, Verdict] = {}
    for name, panel_of in result["panels"].items():
        times = outcomes.from_json(panel_of["times"]["UA"])
        order, last = judge_times(times), _hardest_last(times, panel_of["max_time"])
        lost = _accuracy_lost(result["rows"][name])
        found[name] = combined({"order": order, f"hardest longest{lost}": last})
    return combined(found)


def _hardest_last(times: np.ndarray, most: float) -> Verdict:
    """Decide whether the hardest set takes longest, by the difference to the next."""
    times = np.minimum(times, most)
    longer = mean_interval(times[:, -1] - times[:, :-1].max(1))
    more = f"hardest minus next longest set: {text_of(longer, 1)} epochs"
    return Verdict(of_interval(longer.low, longer.high), more)


def _accuracy_lost(rows: dict[str, Any]) -> str:
    """Return a remark if a set costs more than five points of test accuracy."""
    lost = np.subtract(rows["TA before"], rows["TA after"]).mean(0)
    if lost.max() <= TOLERATED:
        return ""
    where = STRATA[int(lost.argmax())]
    return f" (at a cost of {100 * lost.max():.0f} points of test accuracy on {where})"


def _draw(result: Result) -> Picture:
    return draw_panels(result["panels"])


def _table(result: Result) -> str:
    """Return a Markdown table: a line per method and stratum, means with intervals."""
    header = [
        "method",
        "stratum",
        "epochs by UA",
        "epochs by MIA",
        "UA before → after (oracle)",
        "MIA before → after (oracle)",
        "TA before → after (oracle)",
        f"barrier on {JUDGED} before → after (between oracles)",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in NAMES:
        for number, stratum in enumerate(STRATA):
            cells = [method, stratum, *_cells(result, method, number)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(result: Result, method: str, number: int) -> list[str]:
    """Return the cells of one method and stratum."""
    found, rows = result["panels"][method], result["rows"][method]
    times = [
        outcomes.from_json(found["times"][name])[:, number] for name in ("UA", "MIA")
    ]
    cells = [epochs_text(one, found["max_time"]) for one in times]
    for name in ("UA", "MIA", "TA"):
        before, after = (
            interval_text(np.array(rows[f"{name} {when}"])[:, number])
            for when in ("before", "after")
        )
        oracle = np.mean(result["oracles"][number][COLUMNS[name]])
        cells.append(f"{before} → {after} ({oracle:.3f})")
    before = interval_text(np.array(result["before"])[:, number])
    after = interval_text(np.array(rows["barrier after"])[:, number])
    cells.append(f"{before} → {after} ({np.mean(result['baseline'][number]):.3f})")
    return cells


FIGURES = [
    Figure(
        "methods",
        "The privacy loss predicts difficulty for every unlearning method: harder "
        "sets take longer, and the hardest set takes longest.",
        _units,
        _result,
        _judge,
        _draw,
        _table,
    )
]
