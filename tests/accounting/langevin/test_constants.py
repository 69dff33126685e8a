import math

import numpy as np
import pytest
from scipy.special import expit

from opacus_pi.accounting.langevin.constants import (
    logistic_constants,
    public_logistic_constants,
    ridge_constants,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4)) * [1.0, 2.0, 0.5, 1.0]
Y = np.sign(RNG.normal(size=30))
TARGETS = RNG.normal(size=30)
RADIUS, REGULARISATION = 1.5, 0.05


def on_the_ball(number=200):
    direction = RNG.normal(size=(number, 4))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return direction * RADIUS * RNG.uniform(0, 1, (number, 1)) ** 0.25


def logistic(w):
    slope = expit(-Y * (X @ w))
    each = -(slope * Y)[:, None] * X
    weight = slope * (1 - slope)
    hessian = (X * weight[:, None]).T @ X / len(X) + REGULARISATION * np.eye(4)
    return each, hessian


def ridge(w):
    each = (X @ w - TARGETS)[:, None] * X
    return each, X.T @ X / len(X) + REGULARISATION * np.eye(4)


@pytest.mark.parametrize(
    ("problem", "constants"),
    [
        (logistic, logistic_constants(X, regularisation=REGULARISATION, radius=RADIUS)),
        (
            ridge,
            ridge_constants(X, TARGETS, regularisation=REGULARISATION, radius=RADIUS),
        ),
        (
            ridge,
            ridge_constants(
                X,
                TARGETS,
                regularisation=REGULARISATION,
                radius=RADIUS,
                only_these_rows=True,
            ),
        ),
        (
            logistic,
            public_logistic_constants(
                len(X),
                regularisation=REGULARISATION,
                max_row_norm=float(np.linalg.norm(X, axis=1).max()),
                radius=RADIUS,
            ),
        ),
    ],
)
def test_constants_hold_on_the_domain(problem, constants):
    for w in on_the_ball():
        each, hessian = problem(w)
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert eigenvalues[-1] <= constants.smoothness
        assert eigenvalues[0] >= constants.strong_convexity
        assert (np.linalg.norm(each, axis=1) <= constants.example_bounds).all()
        whole = each.mean(axis=0) + REGULARISATION * w
        assert np.linalg.norm(whole) <= constants.gradient_bound


def test_constants_are_not_loose_where_they_can_be_met():
    at_zero = np.linalg.eigvalsh(logistic(np.zeros(4))[1])[-1]
    found = logistic_constants(X, regularisation=REGULARISATION)
    assert found.smoothness == pytest.approx(at_zero, rel=1e-9)
    assert found.gradient_bound == math.inf
    found = ridge_constants(
        X,
        TARGETS,
        regularisation=REGULARISATION,
        radius=RADIUS,
        only_these_rows=True,
    )
    eigenvalues = np.linalg.eigvalsh(ridge(np.zeros(4))[1])
    assert found.strong_convexity == pytest.approx(eigenvalues[0], rel=1e-9)
    assert found.smoothness == pytest.approx(eigenvalues[-1], rel=1e-9)


def test_the_denominator_stays_when_points_leave():
    whole = logistic_constants(X, regularisation=REGULARISATION)
    rest = logistic_constants(X[3:], regularisation=REGULARISATION, denominator=len(X))
    assert rest.denominator == whole.denominator == 30
    assert rest.smoothness <= whole.smoothness


def test_constants_hold_for_whatever_rows_remain():
    """The defaults hold after any removal; those of these rows alone do not."""
    shared = {"regularisation": REGULARISATION, "radius": RADIUS}
    whole = ridge_constants(X, TARGETS, **shared)
    own = ridge_constants(X, TARGETS, **shared, only_these_rows=True)
    smallest = []
    for _ in range(200):
        keep = RNG.random(len(X)) < RNG.uniform(0.05, 1)
        hessian = X[keep].T @ X[keep] / len(X) + REGULARISATION * np.eye(4)
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert whole.strong_convexity <= eigenvalues[0] * (1 + 1e-12)
        assert eigenvalues[-1] <= whole.smoothness
        for w in on_the_ball(5):
            pull = X[keep].T @ (X[keep] @ w - TARGETS[keep]) / len(X)
            assert np.linalg.norm(pull + REGULARISATION * w) <= whole.gradient_bound
        smallest.append(eigenvalues[0])
    assert min(smallest) < own.strong_convexity


def test_public_constants_depend_on_no_row():
    found = public_logistic_constants(50, regularisation=0.01, radius=2.0)
    assert found.smoothness == pytest.approx(0.26)
    assert found.smoothness >= 0.26
    assert found.strong_convexity == 0.01
    assert found.gradient_bound == pytest.approx(1.02)
    assert found.example_bounds.tolist() == [1.0] * 50
    assert found.denominator == 50
    rows = X / np.linalg.norm(X, axis=1, keepdims=True)
    own = logistic_constants(rows, regularisation=0.01, denominator=50)
    assert own.smoothness <= found.smoothness


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logistic_constants(X[0], regularisation=1.0), r"shape \(n, d\)"),
        (
            lambda: logistic_constants(X, regularisation=0.0),
            "regularisation must .*got 0",
        ),
        (
            lambda: logistic_constants(X, regularisation=1.0, denominator=0),
            "denominator must .*got 0",
        ),
        (
            lambda: ridge_constants(X, TARGETS[1:], regularisation=1.0, radius=1.0),
            "targets must .*got an array",
        ),
        (
            lambda: ridge_constants(X, TARGETS, regularisation=1.0, radius=math.inf),
            "radius must .*got inf",
        ),
        (
            lambda: public_logistic_constants(0, regularisation=1.0),
            "num_examples must .*got 0",
        ),
        (
            lambda: public_logistic_constants(
                5, regularisation=1.0, max_row_norm=math.inf
            ),
            "max_row_norm must .*got inf",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
