"""U-LiRA, KLOM, tug of war and their intervals against closed forms."""

import numpy as np
import pytest
from scipy import stats

from opacus_pi.evaluation.intervals import epsilon_interval, mean_interval
from opacus_pi.evaluation.metrics import tug_of_war
from opacus_pi.evaluation.shadow_models import klom, u_lira


def ratio_by_hand(judged, own, other):
    densities = [
        stats.norm.logpdf(judged, np.mean(side), np.std(side, ddof=1))
        for side in (own, other)
    ]
    return densities[0] - densities[1]


def test_u_lira_equals_a_loop_over_models():
    random = np.random.default_rng(0)
    a, b = random.normal(1, 2, (7, 3)), random.normal(0, 1, (5, 3))
    got = u_lira(a, b)
    for e in range(3):
        for i in range(7):
            own, other = np.delete(a[:, e], i), np.delete(b[:, e], i % 5)
            want = ratio_by_hand(a[i, e], own, other)
            assert got.unlearned[i, e] == pytest.approx(want)
        for i in range(5):
            own, other = np.delete(b[:, e], i), np.delete(a[:, e], i % 7)
            want = -ratio_by_hand(b[i, e], own, other)
            assert got.retrained[i, e] == pytest.approx(want)
    called = (got.unlearned > 0).mean(0), (got.retrained > 0).mean(0)
    np.testing.assert_allclose(got.accuracies, (called[0] + 1 - called[1]) / 2)


@pytest.mark.parametrize("sizes", [(6, 6), (12, 5)])
def test_u_lira_of_the_same_law_is_one_half_even_with_few_models(sizes):
    random = np.random.default_rng(1)
    a, b = (random.normal(size=(k, 20_000)) for k in sizes)
    accuracies = u_lira(a, b).accuracies
    error = accuracies.std() / np.sqrt(len(accuracies))
    assert abs(accuracies.mean() - 0.5) < 4 * error


def test_u_lira_approaches_the_best_attack_on_two_normals():
    """Means 0 and d, equal spread: the best balanced accuracy is Φ(d / 2)."""
    random = np.random.default_rng(2)
    for distance in (0.5, 1.0, 3.0):
        a = random.normal(distance, 1, (300, 60))
        b = random.normal(0, 1, (300, 60))
        want = stats.norm.cdf(distance / 2)
        assert u_lira(a, b).accuracy == pytest.approx(want, abs=0.015)


def test_u_lira_of_constant_margins_sees_nothing_or_everything():
    ones = np.ones((5, 2))
    assert u_lira(ones, ones).accuracy == 0.5
    assert u_lira(ones, 2 * ones).accuracy == 1.0


def test_u_lira_epsilons_count_the_errors_of_each_example():
    random = np.random.default_rng(3)
    result = u_lira(random.normal(1, 1, (50, 4)), random.normal(0, 1, (40, 4)))
    for e, got in enumerate(result.epsilons()):
        fp = int((result.retrained[:, e] > 0).sum())
        fn = int((result.unlearned[:, e] <= 0).sum())
        assert got == epsilon_interval(fp, 40, fn, 50)
    (separate, _) = u_lira(np.eye(20, 2), np.eye(20, 2) + 50).epsilons()
    assert separate.estimate == separate.high == np.inf
    assert 0 < separate.low < np.inf


def test_epsilon_of_known_error_rates():
    got = epsilon_interval(100, 1000, 300, 1000, delta=1e-5)
    assert got.estimate == pytest.approx(np.log((1 - 1e-5 - 0.3) / 0.1))
    assert got.low < got.estimate < got.high
    guessing = epsilon_interval(500, 1000, 500, 1000)
    assert guessing.estimate == guessing.low == 0


def test_epsilon_of_randomised_response_is_covered():
    """Errors of the best attack on an epsilon-private bit are 1 / (1 + e^epsilon)."""
    random, epsilon = np.random.default_rng(4), 1.2
    rate = 1 / (1 + np.exp(epsilon))
    covered = 0
    for _ in range(300):
        fp, fn = random.binomial(200, rate, 2)
        got = epsilon_interval(fp, 200, fn, 200, delta=1e-9)
        covered += got.low <= epsilon <= got.high
    assert covered >= 0.95 * 300 - 3 * np.sqrt(300 * 0.05 * 0.95)


def test_mean_interval_covers_at_its_level():
    random = np.random.default_rng(5)
    hits = 0
    for _ in range(2000):
        got = mean_interval(random.normal(3, 2, 5))
        hits += got.low <= 3 <= got.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)
    values = random.normal(size=8)
    wide = stats.t.interval(0.9, 7, values.mean(), stats.sem(values))
    assert mean_interval(values, confidence=0.9)[1:] == pytest.approx(wide)
    assert mean_interval([2.0]) == (2.0, -np.inf, np.inf)


def klom_by_hand(unlearned, oracle, num_bins=20):
    edges = np.histogram_bin_edges(np.concatenate([unlearned, oracle]), num_bins)
    p = np.histogram(unlearned, edges)[0] / len(unlearned)
    q = np.maximum(np.histogram(oracle, edges)[0] / len(oracle), 1e-5)
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)


def test_klom_equals_a_loop_over_examples():
    random = np.random.default_rng(6)
    a, b = random.normal(1, 2, (60, 9)), random.normal(0, 1, (45, 9))
    want = [klom_by_hand(a[:, e], b[:, e]) for e in range(9)]
    np.testing.assert_allclose(klom(a, b), want, rtol=1e-12)


def test_klom_converges_to_the_divergence_of_binned_normals():
    random = np.random.default_rng(7)
    a, b = random.normal(0.5, 1, (200_000, 1)), random.normal(0, 1, (200_000, 1))
    assert klom(a, b)[0] == pytest.approx(0.5**2 / 2, rel=0.05)


def test_klom_of_one_law_has_the_stated_bias():
    """The chi-square law of a binned divergence, where all bins are well filled."""
    random = np.random.default_rng(8)
    a, b = random.random((1000, 800)), random.random((1000, 800))
    assert klom(a, b, num_bins=10).mean() == pytest.approx(9 / 1000, rel=0.1)


def test_klom_at_its_ends():
    same = np.random.default_rng(9).normal(size=(10, 3))
    assert (klom(same, same) == 0).all()
    apart = klom(np.zeros((10, 1)), np.full((10, 1), 500.0))
    assert apart[0] == pytest.approx(np.log(1e5))
    assert klom(np.ones((4, 1)), np.ones((4, 1))) == [0.0]


def test_tug_of_war_by_hand():
    mine = {"unlearning_accuracy": 0.1, "retain_accuracy": 0.9, "test_accuracy": 0.7}
    oracle = {
        "unlearning_accuracy": [0.2, 0.4],
        "retain_accuracy": 1.0,
        "test_accuracy": [0.8],
    }
    assert tug_of_war(mine, oracle) == pytest.approx(0.8 * 0.9 * 0.9)
    assert tug_of_war(mine, mine) == 1.0
    attack = {"membership_inference": 0.5}
    got = tug_of_war(mine | attack, mine | attack, forget_metric="membership_inference")
    assert got == 1.0


GOOD = {"unlearning_accuracy": 0.1, "retain_accuracy": 0.9, "test_accuracy": 0.7}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: u_lira(np.ones(3), np.ones((3, 1))),
            r"unlearned_margins must .*\(3,\)",
        ),
        (lambda: u_lira(np.ones((3, 1)), np.ones((2, 1))), "at least 3 models"),
        (
            lambda: u_lira(np.ones((3, 1)), np.ones((3, 2))),
            "oracle_margins must have 1 examples, .*got 2",
        ),
        (lambda: u_lira(np.full((3, 1), np.inf), np.ones((3, 1))), "not finite"),
        (
            lambda: epsilon_interval(3, 2, 0, 2),
            r"false_positives must be in \[0, 2\], got 3.0",
        ),
        (
            lambda: epsilon_interval(0, 0, 0, 2),
            "num_positives must .*got 0|num_negatives must .*got 0",
        ),
        (lambda: epsilon_interval(0, 2, 0, 2, delta=1), "delta must .*got 1.0"),
        (lambda: mean_interval([]), r"values must contain .*got \[\]"),
        (lambda: mean_interval([1, np.nan]), r"values must not contain NaN"),
        (lambda: mean_interval([1, 2], confidence=1), "confidence must .*got 1.0"),
        (lambda: klom(np.ones((3, 1)), np.ones((3, 2))), r"shapes \(3, 1\), \(3, 2\)"),
        (lambda: klom([[np.nan]], [[1.0]]), "must be numbers"),
        (lambda: klom([[1.0]], [[1.0]], num_bins=0), "num_bins must .*got 0"),
        (
            lambda: tug_of_war({}, GOOD),
            r"metrics must contain 'unlearning_accuracy', got \[\]",
        ),
        (
            lambda: tug_of_war(GOOD, GOOD | {"test_accuracy": 2}),
            "test_accuracy must .*got 2.0",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
