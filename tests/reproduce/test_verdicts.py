"""Verdicts follow from the numbers, and judge every part of a claim."""

import numpy as np
import pytest

from benchmarks.reproduce import figures
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    DOES_NOT_HOLD,
    HOLDS,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    all_of,
    of_interval,
)
from benchmarks.reproduce.publication import verdict_on


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


def proxies(mean, other):
    losses = np.arange(200.0)
    drawn = {"privacy loss": losses, "mean norm": losses, "EL2N": losses}
    rho = {"mean norm": mean, "EL2N": other}
    return {"rho": rho, "drawn": drawn, "num_examples": 10_000}


@pytest.mark.parametrize(
    ("mean", "other", "verdict"),
    [
        ([0.97, 0.98, 0.98], [0.90, 0.92, 0.91], BORNE_OUT),
        ([0.90, 0.92, 0.91], [0.97, 0.98, 0.98], NOT_BORNE_OUT),
        ([0.90, 0.98, 0.94], [0.96, 0.91, 0.93], UNDECIDED),
        ([0.97, 0.98, 0.98], [0.30, 0.31, 0.32], NOT_BORNE_OUT),
    ],
)
def test_proxies_are_judged_by_seed(mean, other, verdict):
    found = FIGURES["fig2"].judge(proxies(mean, other))
    assert found.verdict == verdict and "3 trainings" in found.because


def groups(slope, spread):
    """Bounds of ten sets, easiest first, that change by this slope."""
    rng = np.random.default_rng(0)
    b1 = 10 + slope * np.arange(10) + 0.05 * rng.normal(size=(5, 10))
    return {
        "mean_loss": np.tile(np.arange(10.0), (5, 1)),
        "b1": b1,
        "b1_std": np.full((5, 10), spread),
        "coupled": np.tile(np.arange(10.0), (5, 1)),
        "reliable": np.arange(50).reshape(5, 10) > 2,
    }


@pytest.mark.parametrize(
    ("slope", "spread", "verdict"),
    [(0.0, 2.0, BORNE_OUT), (0.5, 1.0, "rises"), (-0.5, 1.0, "falls")],
)
def test_a_group_bound_that_falls_is_not_flat_either(slope, spread, verdict):
    found = FIGURES["fig4"].judge(groups(slope, spread))
    changes = verdict in ("rises", "falls")
    if changes:
        assert found.verdict == NOT_BORNE_OUT
    assert found.parts["the same for all"].verdict == (
        NOT_BORNE_OUT if changes else BORNE_OUT
    )
    rises = "does not rise: not borne out" in found.because
    assert rises == (verdict == "rises")
    assert "3 of 50 values are Monte Carlo means that are too low" in found.because


def ranks(pair):
    matrices = [[[1.0, rho], [rho, 1.0]] for rho in pair]
    names = ["0.1", "0.01"]
    return {"names": names, "num_examples": 10_000, "panels": {"digits": matrices}}


def test_rankings_agree_by_the_interval_of_the_pair_that_agrees_least():
    judge = FIGURES["ranks"].judge
    assert judge(ranks([0.98, 0.99, 0.98])).verdict == BORNE_OUT
    assert judge(ranks([0.5, 0.6, 0.5])).verdict == NOT_BORNE_OUT
    unsure = judge(ranks([0.8, 0.99, 0.98]))
    assert unsure.verdict == UNDECIDED and "0.1 and 0.01" in unsure.because


def test_one_part_that_fails_decides_and_one_that_is_open_leaves_it_open():
    every = [BORNE_OUT, UNDECIDED, NOT_TESTABLE, NOT_BORNE_OUT]
    assert all_of(every) == NOT_BORNE_OUT
    assert all_of([BORNE_OUT, UNDECIDED, NOT_TESTABLE]) == NOT_TESTABLE
    assert all_of([BORNE_OUT, UNDECIDED]) == UNDECIDED
    assert all_of([BORNE_OUT, BORNE_OUT]) == BORNE_OUT
    assert of_interval(0.0, 0.0) == of_interval(-1.0, 0.0) == UNDECIDED


def certified(own):
    """A result of which the first row has this many steps."""
    steps = {"shifted": own, "Corollary 4.4": 100}
    return {"rows": [{"num_points": 1, "steps": steps}]}


def test_numbers_that_follow_from_constants_are_computed_and_not_judged():
    few_seeds = {"sgd": {"num_seeds": 1}}
    for own, verdict in ((10, HOLDS), (1_000, DOES_NOT_HOLD)):
        found = verdict_on(FIGURES["certified"], certified(own), few_seeds)
        assert found.verdict == verdict and "nothing to test" in found.reason


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float64("nan")])
def test_a_number_that_is_not_finite_is_not_judged(bad):
    result = ranks([0.98, 0.99, 0.98])
    scale = {"sgd": {"num_seeds": 3}}
    assert verdict_on(FIGURES["ranks"], result, scale).verdict == BORNE_OUT
    result["panels"]["digits"][1][0][1] = bad
    found = verdict_on(FIGURES["ranks"], result, scale)
    assert found.verdict == NOT_TESTABLE
    assert "1 values are NaN or infinite: result, panels, digits, 1" in found.reason
