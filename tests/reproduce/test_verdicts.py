"""Verdicts follow from the numbers, and judge every part of a claim."""

import numpy as np
import pytest

from benchmarks.reproduce import figures
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.figures.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    medians_text,
    ordering,
)


@pytest.mark.parametrize("module", figures._MODULES, ids=lambda one: one.__name__)
def test_every_header_states_claim_data_seeds_and_settings(module):
    header = " ".join(module.__doc__.lower().split())
    for word in ("claim", "data", "seeds", "settings"):
        assert word in header


def test_the_papers_figures_come_first_and_in_order():
    names = list(FIGURES)
    paper = [name for name in names if name.startswith("fig")]
    assert paper == sorted(paper) == names[: len(paper)] and len(paper) == 11
    assert len(set(names)) == sum(len(one.FIGURES) for one in figures._MODULES)


def test_one_rho_for_all_seeds_is_no_interval():
    same = ordering(np.array([[0.0, 1.0, 2.0]] * 4))
    assert same.verdict == BORNE_OUT
    assert same.because.startswith("Spearman 1.00 in each of 4 seeds; 0 %")
    other = ordering(np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]))
    assert "95 % [" in other.because and "over 3 seeds" in other.because


def test_medians_say_never():
    times = np.array([[0.0, 3.0, np.inf], [0.0, 5.0, 2.0], [1.0, 4.0, np.inf]])
    assert medians_text(times) == "0, 4, never"
    assert medians_text(times[:2]) == "0, 5, never"  # of two the longer


def proxies(mean, other):
    return {"rho": {"mean norm": mean, "EL2N": other}}


@pytest.mark.parametrize(
    ("mean", "other", "verdict"),
    [
        ([0.97, 0.98, 0.98], [0.90, 0.92, 0.91], BORNE_OUT),
        ([0.90, 0.92, 0.91], [0.97, 0.98, 0.98], NOT_BORNE_OUT),
        ([0.90, 0.98, 0.94], [0.96, 0.91, 0.93], NOT_TESTABLE),
        ([0.97, 0.98, 0.98], [0.30, 0.31, 0.32], NOT_BORNE_OUT),
    ],
)
def test_proxies_are_judged_by_seed(mean, other, verdict):
    found = FIGURES["fig2"].judge(proxies(mean, other))
    assert found.verdict == verdict and "n = 3" in found.because


def groups(b1, spread):
    seeds = len(b1)
    return {
        "b1": b1,
        "b1_std": [[spread] * len(b1[0])] * seeds,
        "coupled": [[1.0, 2.0, 3.0]] * seeds,
        "reliable": [[True, True, False]] * seeds,
    }


@pytest.mark.parametrize(
    ("b1", "spread", "verdict"),
    [
        ([[10.0, 10.1, 9.9], [9.9, 10.0, 10.1], [10.2, 10.0, 9.8]], 2.0, BORNE_OUT),
        ([[10.0, 11.0, 12.0], [9.0, 10.0, 12.0], [10.0, 11.0, 13.0]], 5.0, "rises"),
        ([[10.0, 9.0, 5.0], [10.0, 11.0, 5.1], [10.0, 9.5, 4.9]], 2.0, "falls"),
        ([[10.0, 9.0, 5.0], [10.0, 11.0, 9.0], [10.0, 9.5, 12.0]], 2.0, NOT_TESTABLE),
    ],
)
def test_a_group_bound_that_falls_is_not_flat_either(b1, spread, verdict):
    found = FIGURES["fig4"].judge(groups(b1, spread))
    changes = verdict in ("rises", "falls")
    assert found.verdict == (NOT_BORNE_OUT if changes else verdict)
    rises = "does not rise: not borne out" in found.because
    assert rises == (verdict == "rises")
    assert "3 of 9 values are Monte Carlo means that are too low" in found.because


def ranks(pair):
    matrices = [[[1.0, rho], [rho, 1.0]] for rho in pair]
    return {"names": ["0.1", "0.01"], "panels": {"digits": matrices}}


def test_rankings_agree_by_the_interval_of_the_pair_that_agrees_least():
    judge = FIGURES["ranks"].judge
    assert judge(ranks([0.98, 0.99, 0.98])).verdict == BORNE_OUT
    assert judge(ranks([0.5, 0.6, 0.5])).verdict == NOT_BORNE_OUT
    unsure = judge(ranks([0.8, 0.99, 0.98]))
    assert unsure.verdict == NOT_TESTABLE and "0.1 and 0.01" in unsure.because


def method(times, after):
    panel = {"times": {"UA": times}, "max_time": 9}
    rows = {"TA before": [[0.9] * 3] * 3, "TA after": [[0.9, 0.9, after]] * 3}
    return {"panels": {"one": panel}, "rows": {"one": rows}}


def test_a_method_that_unlearns_the_hardest_set_sooner_is_not_predicted():
    judge = FIGURES["methods"].judge
    rising = [[0.0, 2.0, 5.0], [0.0, 1.0, 6.0], [0.0, 2.0, None]]
    assert judge(method(rising, 0.9)).verdict == BORNE_OUT
    peak = [[0.0, 8.0, 2.0], [0.0, 9.0, 1.0], [0.0, None, 2.0]]
    found = judge(method(peak, 0.1))
    assert found.verdict == NOT_BORNE_OUT  # though the order by ranks rises
    assert "80 points of test accuracy on" in found.because
    assert "points of test accuracy" not in judge(method(rising, 0.86)).because
