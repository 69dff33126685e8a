import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import expit

from opacus_pi.evaluation.membership import membership_inference
from opacus_pi.evaluation.metrics import accuracy, unlearning_accuracy


def beta(random, a, b, n):
    return random.beta(a, b, n)


def test_forget_drawn_as_train_and_as_test_where_the_two_are_separate():
    random = np.random.default_rng(0)
    train, test = random.uniform(0.8, 1, 500), random.uniform(0, 0.5, 60)
    as_train = membership_inference(train, test, random.uniform(0.8, 1, 100))
    as_test = membership_inference(train, test, random.uniform(0, 0.5, 100))
    assert float(as_train) == 0.0
    assert float(as_test) == 1.0
    assert as_train.attacker_accuracy == as_test.attacker_accuracy == 1.0


@pytest.mark.parametrize("sizes", [(100, 100), (2000, 50), (50, 2000)])
def test_scores_drawn_alike_give_one_half_in_the_mean_over_draws(sizes):
    """Also where the sets are unbalanced: the reason for the class weights.

    There the boundary leans to the side of the small set by half the distance of the
    two means, which is of order 1/√50; without weights the answer would be 0 or 1.
    """
    random = np.random.default_rng(1)
    draws = [
        membership_inference(
            *(beta(random, 5, 2, n) for n in (*sizes, 100))
        ).forget_called_test
        for _ in range(300)
    ]
    error = np.std(draws) / np.sqrt(len(draws))
    lean = 0 if sizes[0] == sizes[1] else 0.2 / np.sqrt(min(sizes))
    assert abs(np.mean(draws) - 0.5) < 4 * error + lean
    assert 0 < error < 0.03


def balanced_logistic(retain, test, forget):
    """The same attack by scipy on the penalised, weighted likelihood."""
    x = np.concatenate([retain, test])
    y = np.repeat([-1.0, 1.0], [len(retain), len(test)])
    weight = np.where(y < 0, len(x) / (2 * len(retain)), len(x) / (2 * len(test)))
    z = (x - x.mean()) / x.std()

    def objective(w):
        return w[0] ** 2 / 2 + weight @ np.logaddexp(0, -y * (w[0] * z + w[1]))

    slope, offset = minimize(objective, [0.0, 0.0], tol=1e-12).x
    boundary = brentq(
        lambda c: expit(slope * (c - x.mean()) / x.std() + offset) - 0.5, -9, 9
    )
    return np.mean((forget > boundary) == (slope > 0))


def test_against_an_independent_fit():
    random = np.random.default_rng(2)
    sets = beta(random, 6, 2, 400), beta(random, 3, 2, 90), beta(random, 4, 2, 200)
    got = membership_inference(*sets)
    assert got.forget_called_test == pytest.approx(balanced_logistic(*sets), abs=0.01)
    assert 0.5 < got.attacker_accuracy < 0.9


def test_a_narrow_range_of_confidences_is_still_told_apart():
    train = 1 - np.linspace(1, 2, 200) * 1e-7
    test = 1 - np.linspace(3, 4, 50) * 1e-7
    got = membership_inference(train, test, [1 - 1e-7, 1 - 4e-7])
    assert got.forget_called_test == 0.5
    assert got.attacker_accuracy == 1.0


def test_an_attacker_that_sees_nothing_guesses():
    got = membership_inference([1.0] * 5, [1.0] * 3, [1.0, 0.2])
    assert (got.forget_called_test, got.attacker_accuracy) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (([], [0.1], [0.1]), r"retain_confidences must .*got \[\]"),
        (([0.1], [], [0.1]), r"test_confidences must .*got \[\]"),
        (([0.1], [0.1], []), r"forget_confidences must .*got \[\]"),
        (([1.5], [0.1], [0.1]), r"retain_confidences must be in \[0, 1\], got 1.5"),
        (([0.5], [0.1], [np.nan]), "forget_confidences must .*got nan"),
    ],
)
def test_bad_input_is_one_clear_error(sets, message):
    with pytest.raises(ValueError, match=message):
        membership_inference(*sets)


def test_accuracies():
    correct = np.array([True, True, False, True])
    assert accuracy(correct) == 0.75
    assert unlearning_accuracy(correct) == 0.25
    with pytest.raises(
        ValueError, match=r"correct must contain at least one example, got \[\]"
    ):
        unlearning_accuracy([])


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e-300, 2.0**-1040])
def test_confidences_of_a_collapsed_model(scale):
    """Confidences whose squares underflow are separated as well as larger ones."""
    random = np.random.default_rng(2)
    sets = [random.uniform(low, low + 0.3, 40) for low in (0.5, 0.2, 0.35)]
    expected = membership_inference(*sets)
    found = membership_inference(*(part * scale for part in sets))
    assert found.forget_called_test == pytest.approx(expected.forget_called_test)
    assert found.attacker_accuracy == pytest.approx(expected.attacker_accuracy)


@pytest.mark.parametrize("tiny", [5e-324, 1e-300, 1e-45])
def test_a_forget_set_far_from_tiny_confidences(tiny):
    found = membership_inference([0.0] * 5, [tiny] * 5, [0.0, tiny, 1.0])
    assert found.forget_called_test == pytest.approx(2 / 3)
    assert found.attacker_accuracy == 1.0
