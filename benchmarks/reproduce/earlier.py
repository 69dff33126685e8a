"""What earlier runs show, as tables.

These runs had five forget sets, one per stratum. Most of them start at the oracles, and
the results have first crossings of five points, without the path of the gap. So none
can be judged: a test over sets needs at least eight. Their numbers are described here,
until the figures have been run again with more sets.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.report import markdown
from benchmarks.reproduce.judging.order import FEWEST_SETS, beside_oracles
from benchmarks.reproduce.judging.runs import LEAST_GAP
from benchmarks.reproduce.judging.verdicts import NOT_TESTABLE, Verdict

SETS = ("easiest set", "second", "third", "fourth", "hardest set")
_METRICS = {"UA": "unlearning_accuracy", "MIA": "membership_inference"}
_FEW = f"the earlier run has five forget sets, and a test needs at least {FEWEST_SETS}"
Content = dict[str, Any]


def described(folder: Path, name: str) -> tuple[Verdict, str] | None:
    """Return why an earlier run is not judged, and a description of it in Markdown.

    Args:
        folder: The folder of earlier results.
        name: Name of the figure.

    Returns:
        None if there is no such run, or a later one has taken its place.
    """
    if name not in DESCRIPTIONS:
        return None
    return Verdict(NOT_TESTABLE, _FEW), DESCRIPTIONS[name](_result(folder, name))


def _result(folder: Path, name: str) -> Content:
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content["result"]


def _panels(result: Content) -> str:
    """Describe first crossings, in a row for each panel and measure."""
    rows = [["runs", "measure", *SETS]]
    for name, panel in result["panels"].items():
        rows += [
            [name, metric, *_crossings(times)]
            for metric, times in panel["times"].items()
        ]
    return (
        "Epochs until the measure is within five points of the oracles' for the first "
        "time, for each of the five forget sets: the median over the trainings. 0 "
        "means before any unlearning, *never* not within the run.\n\n" + markdown(rows)
    )


def _crossings(rows: list[list[float | None]]) -> list[str]:
    """Return the median epoch within five points of each set, easiest first."""
    times = np.array(rows, dtype=np.float64)
    never = np.where(np.isnan(times), np.inf, times)
    middle = np.quantile(never, 0.5, axis=0, method="higher")
    return [f"{time:g}" if np.isfinite(time) else "never" for time in middle]


def _methods(result: Content) -> str:
    """Describe where each method ended on the sets with something to forget."""
    ua = [np.mean(one[_METRICS["UA"]]) for one in result["oracles"]]
    ta = [np.mean(one["test_accuracy"]) for one in result["oracles"]]
    lines = [["method", "set", "gap by UA", "overshot", "test accuracy"]]
    for name, rows in result["rows"].items():
        before = np.array(rows["UA before"]) - ua
        after = np.array(rows["UA after"]) - ua
        lost = (np.array(ta) - np.array(rows["TA after"])).mean(0)
        for k, which in enumerate(SETS):
            first, last = np.abs(before[:, k]).mean(), np.abs(after[:, k]).mean()
            if max(first, last) > LEAST_GAP:
                beyond = 100 * (after[:, k] > LEAST_GAP).mean()
                gap = f"{first:.2f} → {last:.2f}"
                cells = [name, which, gap, f"{beyond:.0f} %", beside_oracles(lost[k])]
                lines.append(cells)
    return (
        "Where each method ended, for the sets whose mean gap was above five points "
        "before or after the run. *Overshot* is the share of the runs that ended more "
        "than five points beyond the oracles.\n\n" + markdown(lines)
    )


def _private(result: Content) -> str:
    """Describe ε, ties at the largest loss, and first crossings."""
    ties = " ".join(
        f"With {title} the models have ε = {one['epsilon']:.3g}, and "
        f"{one['num_tied']:,} of {one['num_examples']:,} examples share the largest "
        "loss."
        for title, one in result["panels"].items()
    )
    return f"{ties} {_panels(result)}"


DESCRIPTIONS: dict[str, Callable[[Content], str]] = {
    "fig7": _panels,
    "methods": _methods,
    "private": _private,
}


def crossings_and_ends(folder: Path) -> str:
    """Return a table: how often a first crossing was not an arrival.

    Args:
        folder: The folder of earlier results.
    """
    result = _result(folder, "methods")
    ua = np.array([np.mean(one[_METRICS["UA"]]) for one in result["oracles"]])
    ta = np.array([np.mean(one["test_accuracy"]) for one in result["oracles"]])
    lines = [
        [
            "method",
            "runs that came within five points",
            "of these, ended outside",
            "of these, lost more than five points of test accuracy",
        ]
    ]
    for name, rows in result["rows"].items():
        times = np.array(result["panels"][name]["times"]["UA"], dtype=np.float64)
        came = np.isfinite(times)
        outside = np.abs(np.array(rows["UA after"]) - ua) > LEAST_GAP
        lost = ta - np.array(rows["TA after"]) > LEAST_GAP
        counts = [came, came & outside, came & lost]
        lines.append([name, *(str(int(one.sum())) for one in counts)])
    return markdown(lines)
