"""The search: a good choice on objectives whose answer is known."""

import math
import sys

import numpy as np
import pytest

from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.unlearning.search import (
    Trial,
    fastest_good,
    gap_to_oracle,
    search_settings,
)

ORACLE = {"unlearning_accuracy": [0.4, 0.6], "test_accuracy": [0.9]}
RANGES = {"learning_rate": (1e-4, 1.0), "strength": (1e-6, 1e-2)}


def run(settings):
    """The gap is least at 0.01 and 0.0001; larger rates arrive sooner."""
    x, y = math.log10(settings["learning_rate"]), math.log10(settings["strength"])
    missing = 0.03 * abs(x + 2) + 0.05 * abs(y + 4)
    epochs = round(5 - 2 * x)
    values = [0.0] * epochs + [0.5 - missing]
    tests = [0.9] * epochs + [0.9 - missing]
    metrics = {"unlearning_accuracy": values, "test_accuracy": tests}
    return UnlearningTrace(list(range(epochs + 1)), metrics)


def test_the_fastest_within_the_margin_is_chosen():
    pytest.importorskip("optuna")
    found = search_settings(run, RANGES, ORACLE, num_trials=60)
    assert len(found.trials) == 60
    least = min(t.gap for t in found.trials)
    good = [t for t in found.trials if t.gap <= least + 0.05]
    assert found.best in good and found.best.time == min(t.time for t in good)
    gaps = [t.gap for t in found.trials]  # the first ten are random
    assert np.mean(gaps[-20:]) < 0.7 * np.mean(gaps[:10])
    assert found.best.settings["learning_rate"] > 0.02
    for trial in found.trials:
        for name, (low, high) in RANGES.items():
            assert low <= trial.settings[name] <= high


def test_a_search_repeats_by_its_seed():
    pytest.importorskip("optuna")
    first, again, other = (
        search_settings(run, RANGES, ORACLE, num_trials=5, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other


def test_a_run_that_diverges_is_survived():
    pytest.importorskip("optuna")

    def diverging(settings):
        trace = run(settings)
        if settings["learning_rate"] > 1e-2:
            trace.metrics["test_accuracy"][-1] = math.nan
        return trace

    found = search_settings(diverging, RANGES, ORACLE, num_trials=15)
    assert found.best.settings["learning_rate"] <= 1e-2
    assert any(math.isnan(t.gap) for t in found.trials)


def test_choice_among_trials():
    slow, fast, poor = (
        Trial({"lr": lr}, gap, time)
        for lr, gap, time in [(1.0, 0.01, 9), (2.0, 0.05, 3), (3.0, 0.07, 1)]
    )
    never = Trial({"lr": 4.0}, 0.0, math.inf)
    assert fastest_good([slow, fast, poor]) is fast
    assert fastest_good([slow, fast, poor], margin=0.0) is slow
    assert fastest_good([never, slow, fast]) is fast
    assert fastest_good([never, poor]) is never
    twin = Trial({"lr": 5.0}, 0.02, 3)
    assert fastest_good([fast, twin]) is twin
    with pytest.raises(ValueError, match="did not diverge"):
        fastest_good([Trial({}, math.nan, 1)])
    with pytest.raises(ValueError, match="margin must .*got -1"):
        fastest_good([slow], margin=-1)


def test_gap_is_the_mean_distance_at_the_end():
    metrics = {"unlearning_accuracy": [0.0, 0.3], "test_accuracy": [0.9, 0.8]}
    trace = UnlearningTrace([0, 1], metrics)
    assert gap_to_oracle(trace, ORACLE, tuple(metrics)) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="must contain 'other'"):
        gap_to_oracle(trace, ORACLE, ["other"])


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (1.0, np.inf)])
def test_ranges_are_checked_first(ends):
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=r"ranges\['lr'\]"):
        search_settings(None, {"lr": ends}, ORACLE)


def test_without_optuna_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"opacus-pi\[search\]"):
        search_settings(run, RANGES, ORACLE)
