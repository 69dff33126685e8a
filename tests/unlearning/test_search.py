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
    gaps = [t.gap for t in found.trials]  # the first five are random
    assert np.mean(gaps[-20:]) < 0.7 * np.mean(gaps[:5])
    assert found.informative and found.initial_gap == pytest.approx(0.25)
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
    with pytest.raises(ImportError, match=r"optuna"):
        search_settings(run, RANGES, ORACLE)


def memorised_nothing(settings):
    """The model is at the retrained models from the start, whatever the settings."""
    metrics = {"unlearning_accuracy": [0.5, 0.5], "test_accuracy": [0.9, 0.9]}
    return UnlearningTrace([0, 1], metrics)


def test_a_set_with_nothing_to_forget_is_warned_of():
    pytest.importorskip("optuna")
    with pytest.warns(
        UserWarning, match="could not distinguish the settings: .* 0.0000 before"
    ):
        found = search_settings(memorised_nothing, RANGES, ORACLE, num_trials=2)
    assert not found.informative


def test_a_run_that_changes_nothing_is_warned_of():
    pytest.importorskip("optuna")

    def idle(settings):
        metrics = {"unlearning_accuracy": [0.0, 0.0], "test_accuracy": [0.9, 0.9]}
        return UnlearningTrace([0, 1], metrics)

    with pytest.warns(UserWarning, match="0.2500 before unlearning and 0.2500 after"):
        search_settings(idle, RANGES, ORACLE, num_trials=2)


def test_settings_that_destroy_the_model_are_not_chosen():
    pytest.importorskip("optuna")

    def run_at(settings):
        rate = settings["learning_rate"]
        forgotten, kept = (0.5, 0.2) if rate > 0.1 else (0.4 * rate / 0.1, 0.9)
        metrics = {
            "unlearning_accuracy": [0.0, forgotten],
            "test_accuracy": [0.9, kept],
        }
        return UnlearningTrace([0, 1], metrics)

    ranges = {"learning_rate": (1e-3, 1.0)}
    oracle = ORACLE | {"unlearning_accuracy": [0.5]}
    found = search_settings(run_at, ranges, oracle, num_trials=25)
    assert found.best.lost == 0 and 0.03 < found.best.settings["learning_rate"] <= 0.1
    late = [trial.lost > 0 for trial in found.trials[10:]]
    assert np.mean(late) < 0.5


def test_lost_utility_counts_unless_all_lost_it():
    near, kept = Trial({"lr": 1.0}, 0.0, 1, lost=0.3), Trial({"lr": 2.0}, 0.2, 9)
    assert fastest_good([near, kept]) is kept
    assert fastest_good([near]) is near


def path_at(rate):
    """Rates above 0.1 destroy the model at first, and unlearn fastest and best."""
    high = rate > 0.1
    return {
        "unlearning_accuracy": [0.0, 0.5, 0.5] if high else [0.0, 2 * rate, 4 * rate],
        "test_accuracy": [0.9, 0.9, 0.9],
        "retain_accuracy": [1.0, 0.8 if high else 0.99, 1.0],
    }


def test_settings_that_damage_the_model_on_the_way_are_not_chosen():
    pytest.importorskip("optuna")
    ranges, oracle = {"learning_rate": (1e-3, 1.0)}, ORACLE | {"retain_accuracy": [1.0]}

    def chosen(change=lambda rate, metrics: metrics, **options):
        def run_at(settings):
            rate = settings["learning_rate"]
            return UnlearningTrace([0, 1, 2], change(rate, path_at(rate)))

        found = search_settings(run_at, ranges, oracle, num_trials=25, **options)
        return found.best

    def repaired(rate, metrics):
        return metrics | {"test_accuracy": [0.9, 0.8 if rate > 0.1 else 0.9, 0.9]}

    def overshooting(rate, metrics):
        path = [0.0, 0.7, 0.5] if rate > 0.1 else metrics["unlearning_accuracy"]
        return metrics | {"unlearning_accuracy": path}

    assert chosen().settings["learning_rate"] > 0.1  # nothing watches retained images
    held = chosen(held=["retain_accuracy"])
    assert 0.05 < held.settings["learning_rate"] <= 0.1
    assert held.lost == pytest.approx(0.01) and held.beyond == 0
    assert chosen(repaired).settings["learning_rate"] <= 0.1
    assert chosen(overshooting).settings["learning_rate"] <= 0.1


def test_a_metric_to_hold_must_be_known():
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match="other"):
        search_settings(run, RANGES, ORACLE, held=["other"])


def test_beyond_counts_on_the_far_side_only():
    far, near = Trial({}, 0.0, 1, beyond=0.2), Trial({}, 0.2, 9)
    assert fastest_good([far, near]) is near and fastest_good([far]) is far
    pytest.importorskip("optuna")

    def falling(settings):
        metrics = {"unlearning_accuracy": [0.9, 0.6, 0.45], "test_accuracy": [0.9] * 3}
        return UnlearningTrace([0, 1, 2], metrics)

    (trial,) = search_settings(falling, RANGES, ORACLE, num_trials=1).trials
    assert trial.beyond == pytest.approx(0.05) and trial.lost == 0


def test_the_noise_is_that_of_the_mean_of_the_retrained_models():
    pytest.importorskip("optuna")
    found = search_settings(run, RANGES, ORACLE, num_trials=2)
    error = np.std([0.4, 0.6], ddof=1) / math.sqrt(2)
    assert found.noise == pytest.approx(error / 2)  # the other metric has no error
