"""What earlier runs show, read with the present rules.

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
from benchmarks.reproduce.judging.order import FEWEST_SETS
from benchmarks.reproduce.judging.runs import LEAST_GAP
from benchmarks.reproduce.judging.verdicts import DESCRIBED, NOT_TESTABLE, Verdict

STRATA = ("first", "q1", "q2", "q3", "last")
_METRICS = {"UA": "unlearning_accuracy", "MIA": "membership_inference"}
_FEW = f"five forget sets; a test over sets needs at least {FEWEST_SETS}"
_NO_POWER = "no test with 20 forget sets has any power, and the earlier run had five"
Content = dict[str, Any]


def described(folder: Path, name: str) -> Verdict | None:
    """Return what an earlier run of a figure shows; None if there is none.

    Args:
        folder: The folder of earlier results.
        name: Name of the figure.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    remarks = _DESCRIBED.get(name, _panels)(result)
    parts = {key: Verdict("", text) for key, text in remarks.items()}
    if name == "predicted":
        return Verdict(DESCRIBED, _NO_POWER, parts)
    return Verdict(NOT_TESTABLE, _FEW, parts)


def _panels(result: Content) -> dict[str, str]:
    """Describe first crossings, of one panel or several."""
    panels = result.get("panels") or result.get("rates") or {"runs": result}
    return {
        name: "; ".join(_crossings(metric, rows) for metric, rows in one.items())
        for name, one in ((name, panel["times"]) for name, panel in panels.items())
    }


def _crossings(metric: str, rows: list[list[float | None]]) -> str:
    """Describe the first epochs within five points, easiest set first."""
    times = np.array(rows, dtype=np.float64)
    never = np.where(np.isnan(times), np.inf, times)
    middle = np.quantile(never, 0.5, axis=0, method="higher")
    shown = ", ".join(f"{time:g}" if np.isfinite(time) else "never" for time in middle)
    return f"median first epoch within five points by {metric}: {shown}"


def _curves(result: Content) -> dict[str, str]:
    """Describe the whole path of the gap: farther, longer, slower, set by set."""
    found = {}
    for metric, curves in result["curves"].items():
        parts = []
        for rule in STRATA:
            oracle = np.mean(result["oracles"][metric][rule])
            gap = np.abs(np.array(curves[rule]) - oracle).mean(0)
            area = float((gap[1:] + gap[:-1]).sum() / 2)
            text = f"{rule} {gap[0]:.3f} → {gap[-1]:.3f}"
            if gap[0] > LEAST_GAP:
                closed, left = 1 - gap[-1] / gap[0], area / gap[0] / (len(gap) - 1)
                text += (
                    f" (area {area:.1f}; closed {100 * closed:.0f} %, "
                    f"{100 * left:.0f} % remained on average)"
                )
            parts.append(text)
        found[f"gap by {metric}, before → after"] = "; ".join(parts)
    return found | {
        "what this means": "the hardest set has farther to go, and closed the larger "
        "share of its gap; it was not slower than q3"
    }


def _middle(result: Content) -> dict[str, str]:
    """Describe first crossings, and the change of the Gaussian score."""
    gus = {name: np.array(values) for name, values in result["gus"].items()}
    oracle = gus["oracle"].mean(1)
    before, after = (np.abs(gus[when] - oracle).mean() for when in ("before", "after"))
    closed = f"mean distance from the oracles {before:.3f} before, {after:.3f} after"
    return _panels(result) | {"Gaussian score": closed}


def _barriers(result: Content) -> dict[str, str]:
    """Describe the barriers on training images."""
    name = "training images"
    before, after = (np.mean(result[when][name], 0) for when in ("before", "after"))
    pairs = np.mean(result["baseline"][name], 1)
    numbers = [
        f"{rule} {b:.3f} → {a:.3f} ({p:.3f})"
        for rule, b, a, p in zip(STRATA, before, after, pairs, strict=True)
    ]
    text = "; ".join(numbers)
    return {f"barrier on {name}, before → after (3 pairs of oracles)": text}


def _hardest(result: Content) -> dict[str, str]:
    """Describe the final gaps of the hardest sets of several scores."""
    found = {}
    sizes = ", ".join(map(str, result["sizes"]))
    for metric, scores in result["gaps"].items():
        numbers = "; ".join(
            f"{score} {', '.join(f'{gap:.2f}' for gap in np.mean(rows, 0))}"
            for score, rows in scores.items()
        )
        found[f"final gap by {metric}, one set of {sizes} each"] = numbers
    return found


def _groups(result: Content) -> dict[str, str]:
    """Describe the bound of the hardest set relative to the easiest."""
    printed = np.array(result["b1"])
    ratio = (printed[:, -1] / printed[:, 0]).mean()
    spread = 100 * (np.array(result["b1_std"]) / printed).mean()
    return {
        "Theorem B.1, hardest divided by easiest": f"{ratio:.2f}, mean of 5 trainings; "
        f"one standard deviation of an estimate is {spread:.0f} %"
    }


def _methods(result: Content) -> dict[str, str]:
    """Describe where each method ended on the sets with something to forget."""
    ua = [np.mean(one[_METRICS["UA"]]) for one in result["oracles"]]
    ta = [np.mean(one["test_accuracy"]) for one in result["oracles"]]
    found = {}
    for name, rows in result["rows"].items():
        before = np.array(rows["UA before"]) - ua
        after = np.array(rows["UA after"]) - ua
        lost = 100 * (np.array(ta) - np.array(rows["TA after"])).mean(0)
        parts = []
        for k, rule in enumerate(STRATA):
            first, last = np.abs(before[:, k]).mean(), np.abs(after[:, k]).mean()
            if max(first, last) > LEAST_GAP:
                beyond = 100 * (after[:, k] > LEAST_GAP).mean()
                parts.append(
                    f"{rule} {first:.2f} → {last:.2f}, {beyond:.0f} % overshot, test "
                    f"accuracy {abs(lost[k]):.1f} points {_side(lost[k])} the oracles'"
                )
        found[f"{name}, gap by UA"] = "; ".join(parts)
    return found


def _side(lost: float) -> str:
    return "below" if lost > 0 else "above"


def _private(result: Content) -> dict[str, str]:
    """Describe ε, ties at the largest loss, and first crossings."""
    panels = _panels(result)
    return {
        title: f"ε = {one['epsilon']:.3g}; {one['num_tied']:,} of "
        f"{one['num_examples']:,} examples share the largest loss; {panels[title]}"
        for title, one in result["panels"].items()
    }


def _predicted(result: Content) -> dict[str, str]:
    """Say why the predictions were none."""
    return {
        "predictions": "the fit for a seed used the other seeds' runs on the same "
        "sets, so no set was predicted from others"
    }


_DESCRIBED: dict[str, Callable[[Content], dict[str, str]]] = {
    "fig1-middle": _middle,
    "fig1-right": _barriers,
    "fig3": _hardest,
    "fig4": _groups,
    "fig5": _curves,
    "methods": _methods,
    "private": _private,
    "predicted": _predicted,
}


def crossings_and_ends(folder: Path) -> str:
    """Return a table: how often a first crossing was not an arrival.

    Args:
        folder: The folder of earlier results.
    """
    path = folder / "methods.json"
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
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
