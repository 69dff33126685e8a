"""Verdicts follow from the numbers, and judge every part of a claim."""

import numpy as np
import pytest

from benchmarks.reproduce import figures
from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    DESCRIBED,
    DOES_NOT_HOLD,
    HOLDS,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    agreed,
    combined,
    of_tests,
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


def proxies(mean, other, noise):
    """Correlations of trainings, and examples of ten classes with noisy scores."""
    rng, losses = np.random.default_rng(0), np.arange(400.0)
    scores = [losses + 100 * one * rng.normal(size=400) for one in noise]
    drawn = {"privacy loss": losses, "mean norm": scores[0], "EL2N": scores[1]}
    rho = {"mean norm": mean, "EL2N": other}
    classes = np.arange(400) % 10
    return {"rho": rho, "drawn": drawn, "classes": classes.tolist()}


@pytest.mark.parametrize(
    ("mean", "other", "noise", "verdict"),
    [
        ([0.97, 0.98, 0.98], [0.90, 0.92, 0.91], (0.1, 0.5), BORNE_OUT),
        ([0.90, 0.92, 0.91], [0.97, 0.98, 0.98], (0.5, 0.1), NOT_BORNE_OUT),
        ([0.90, 0.98, 0.94], [0.96, 0.91, 0.93], (0.3, 0.3), UNDECIDED),
        ([0.97, 0.98, 0.98], [0.90, 0.92, 0.91], (0.3, 0.3), UNDECIDED),
        ([0.90, 0.98, 0.94], [0.96, 0.91, 0.93], (0.1, 0.3), UNDECIDED),
        ([0.97, 0.98, 0.98], [0.30, 0.31, 0.32], (0.1, 9.0), NOT_BORNE_OUT),
    ],
)
def test_proxies_are_judged_by_class_and_by_seed(mean, other, noise, verdict):
    found = FIGURES["fig2"].judge(proxies(mean, other, noise))
    assert found.verdict == verdict
    for one in found.judged:
        assert (one.effect.units, one.effect.trainings) == ("10 classes", 3)


def test_proxies_without_their_classes_are_not_testable():
    result = proxies([0.97, 0.98, 0.98], [0.90, 0.92, 0.91], (0.1, 0.5))
    del result["classes"]
    found = FIGURES["fig2"].judge(result)
    assert found.verdict == NOT_TESTABLE
    assert "without the classes of the examples" in found.because


def typical(noise):
    """Examples of ten classes, with a loss and a share of other labels."""
    rng, losses = np.random.default_rng(0), np.arange(400.0)
    atypical = losses + 100 * noise * rng.normal(size=400)
    drawn = {"of another label": atypical, "class": np.arange(400) % 10}
    shares = dict.fromkeys(("lowest loss", "highest loss", "all"), 0.1)
    return {
        "spearman": [0.5, 0.52, 0.51],
        "drawn": drawn | {"privacy loss": losses},
        "of_another_label": shares,
        "neighbours": 10,
    }


@pytest.mark.parametrize(
    ("noise", "verdict"), [(1.0, BORNE_OUT), (3.5, UNDECIDED), (50.0, NOT_BORNE_OUT)]
)
def test_atypical_examples_are_counted_within_classes(noise, verdict):
    judge, result = FIGURES["fig9"].judge, typical(noise)
    assert judge(result).verdict == verdict
    del result["drawn"]
    assert judge(result).verdict == NOT_TESTABLE


def groups(slope, noise=0.05, one_set=0.0):
    """Bounds of ten sets, easiest first, that change by this slope."""
    rng = np.random.default_rng(0)
    b1 = 10 + slope * np.arange(10) + noise * rng.normal(size=(5, 10))
    b1[:, 4] += one_set
    return {
        "mean_loss": np.tile(np.arange(10.0), (5, 1)),
        "b1": b1,
        "b1_std": np.ones((5, 10)),
        "coupled": np.tile(np.arange(10.0), (5, 1)),
        "reliable": np.arange(50).reshape(5, 10) > 2,
    }


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (groups(0.0), BORNE_OUT),
        (groups(0.5), NOT_BORNE_OUT),
        (groups(-0.5), NOT_BORNE_OUT),
        (groups(0.0, one_set=5.0), NOT_BORNE_OUT),
        (groups(0.0, noise=2.0), UNDECIDED),
        (groups(0.0, one_set=-100.0), NOT_TESTABLE),
    ],
    ids=["flat", "rises", "falls", "one set", "noise", "below 0"],
)
def test_group_bounds_are_the_same_only_if_no_two_sets_differ(result, verdict):
    found = FIGURES["fig4"].judge(result)
    assert found.verdict == verdict
    assert "3 of 50 values are Monte Carlo means that are too low" in found.because


def ranks(pair):
    """Correlations of one pair of noises, by training and by class."""
    trainings, classes = (
        [[[1.0, rho], [rho, 1.0]] for rho in some] for some in (pair, pair * 3)
    )
    panels = {"panels": {"digits": trainings}, "classes": {"digits": classes}}
    return {"names": ["0.1", "0.01"], "num_examples": 10_000, **panels}


def test_rankings_agree_by_the_interval_of_the_pair_that_agrees_least():
    judge = FIGURES["ranks"].judge
    assert judge(ranks([0.98, 0.99, 0.98])).verdict == BORNE_OUT
    assert judge(ranks([0.5, 0.6, 0.5])).verdict == NOT_BORNE_OUT
    unsure = judge(ranks([0.8, 0.99, 0.98]))
    assert unsure.verdict == UNDECIDED and "0.1 and 0.01" in unsure.because


def test_rankings_whose_classes_were_not_stored_are_not_testable():
    result = ranks([0.98, 0.99, 0.98])
    del result["classes"]
    found = FIGURES["ranks"].judge(result)
    assert found.verdict == NOT_TESTABLE
    assert "0.1 and 0.01" in found.because
    assert "stored without the classes" in found.because


def test_one_part_that_fails_decides_and_one_that_is_open_leaves_it_open():
    yes, perhaps, untested, described = (
        Verdict(kind) for kind in (BORNE_OUT, UNDECIDED, NOT_TESTABLE, DESCRIBED)
    )
    no = Verdict(NOT_BORNE_OUT, p_against=0.001)

    def kind(*parts):
        return combined({str(i): one for i, one in enumerate(parts)}).verdict

    assert kind(yes, perhaps, untested, no) == NOT_BORNE_OUT
    assert kind(yes, perhaps, untested) == NOT_TESTABLE
    assert kind(yes, perhaps) == UNDECIDED
    assert kind(yes, yes) == BORNE_OUT
    assert kind(yes, described) == kind(described, described) == DESCRIBED
    assert kind(described, untested) == NOT_TESTABLE


def test_one_part_of_many_must_fail_more_clearly():
    """A p-value of 1 % decides about two parts, and not about three, nested or not."""
    yes, no = Verdict(BORNE_OUT), Verdict(NOT_BORNE_OUT, p_against=0.01)
    remark = Verdict("", "does not count")
    two = combined({"a": yes, "b": no, "c": remark})
    assert two.verdict == NOT_BORNE_OUT and two.p_against == 0.01
    nested = combined({"one": two, "two": yes})
    assert nested.verdict == UNDECIDED and "among 3 parts" in nested.reason
    assert combined({"one": two, "two": Verdict(NOT_TESTABLE)}).verdict == NOT_BORNE_OUT


def test_measurements_of_one_claim_must_agree():
    yes, open_ = Verdict(BORNE_OUT, "first"), Verdict(UNDECIDED)
    noes = [Verdict(NOT_BORNE_OUT, p_against=p) for p in (0.001, 0.02, 0.01)]
    cases = "if shared", "if not", "if seldom"
    assert agreed([yes, yes], cases) == yes
    no = agreed(noes, cases)
    assert no.verdict == NOT_BORNE_OUT and no.p_against == 0.02
    for other in (open_, noes[0]):
        found = agreed([yes, other], cases)
        assert found.verdict == UNDECIDED and found.p_against == 1.0
        said = f"if shared, the part is borne out; if not, the part is {other.verdict}"
        assert found.reason == "first" and found.remarks == (said,)
    assert agreed([yes, Verdict(NOT_TESTABLE)], cases).verdict == NOT_TESTABLE
    assert agreed(iter([open_, None]), cases) == open_  # the second is not made


def test_both_sides_are_tested_at_two_and_a_half_percent():
    effect = Effect("gap", 0.3, 0.1, 0.5)
    assert of_tests(0.025, 0.9, effect).verdict == BORNE_OUT
    assert of_tests(0.026, 0.03, effect).verdict == UNDECIDED
    no = of_tests(0.9, 0.02, effect, "a remark")
    assert no == Verdict(NOT_BORNE_OUT, effect=effect, remarks=("a remark",))
    assert no.p_against == 0.02


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


def test_parts_of_which_none_was_tested_leave_the_claim_untested():
    untested = {"a": Verdict(NOT_TESTABLE, "no classes"), "b": Verdict("", "a remark")}
    assert combined(untested).verdict == NOT_TESTABLE
    assert combined({"described": Verdict(DESCRIBED, "no power")}).verdict == DESCRIBED
