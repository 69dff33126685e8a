"""The routes that the benchmark compares with, against slow computations."""

import math

import numpy as np
import pytest
from scipy.special import expit

from benchmarks import certified_heads, head_difficulty
from benchmarks.head_routes import (
    NewtonHead,
    chien_steps,
    high_probability_steps,
    newton_noise,
)
from opacus_pi.unlearning.heads import RidgeHead, SoftmaxHead, unit_rows

RNG = np.random.default_rng(0)
LABELS = RNG.integers(10, size=60)
ROWS = unit_rows(RNG.normal(size=(60, 5)) + np.eye(5)[LABELS % 5])


def test_sensitivities_of_high_probability_cover_runs_and_exceed_the_exact_value():
    head = RidgeHead(num_classes=10, num_steps=40, noise_std=0.02, seed=0)
    head.fit(ROWS, LABELS)
    for i in (0, 7, 21):
        epsilon, steps = high_probability_steps(head, ROWS[i], head._targets[i])
        assert epsilon > head.epsilons(indices=[i])[0]
        assert steps >= head.steps_to(1.0, indices=[i])[0]


def test_chien_needs_more_steps_than_the_shifted_divergence():
    head = SoftmaxHead(num_classes=10, num_steps=100, noise_std=0.05, seed=0)
    head.fit(ROWS, LABELS)
    before, steps = chien_steps(head, 1)
    assert before > head.epsilons()[0] and steps > head.steps_to(1.0)[0]
    assert chien_steps(head, 10)[1] > steps


def test_what_newton_leaves_is_below_the_bound():
    """One removal by solving with the Hessian, and the gradient that is left."""
    head = NewtonHead(ROWS, LABELS, 0.05, 0.0, RNG)
    index, left = 11, 0.0
    kept = np.delete(np.arange(60), index)
    for column, w in enumerate(head.weights):
        signs = head.signs[:, column]

        def gradient(w, signs=signs):
            pull = signs[kept] * expit(-signs[kept] * (ROWS[kept] @ w))
            return 0.05 * 59 * w - ROWS[kept].T @ pull

        curvature = expit(ROWS[kept] @ w) * expit(-ROWS[kept] @ w)
        hessian = (ROWS[kept].T * curvature) @ ROWS[kept] + 0.05 * 59 * np.eye(5)
        own = (
            0.05 * w
            - signs[index] * expit(-signs[index] * ROWS[index] @ w) * ROWS[index]
        )
        left += np.square(gradient(w + np.linalg.solve(hessian, own))).sum()
    bound = head.residuals(np.array([index]))[0]
    assert 0 < math.sqrt(left) <= bound
    assert newton_noise(bound) == pytest.approx(bound * math.sqrt(2 * math.log(1.5e5)))


def test_speed_is_measured_against_all_dimensions():
    found = certified_heads.speed(12, 50, num_dense=4)
    assert -1e-11 <= found["largest excess"] < 1e-6
    assert found["per second"] > 0 and found["functions"] <= 12


def test_the_bound_on_recorded_runs_is_above_the_exact_divergence():
    head = RidgeHead(num_classes=10, num_steps=60, noise_std=0.02, seed=0)
    head.fit(ROWS, LABELS)
    bound = head_difficulty.bound(head, np.random.default_rng(1))
    order = np.array([head_difficulty.ORDER])
    exact = [
        head._gap(np.array([i])).pair(0).divergences(order)[0, 0] for i in range(60)
    ]
    assert (bound >= exact).all()
    again = head_difficulty.recorded_loss(head, LABELS, seed=0)
    assert (again >= exact).all() and again.shape == (60,)


def test_simulated_steps_fall_with_the_noise():
    loud, quiet = (
        RidgeHead(num_classes=10, num_steps=40, noise_std=std, seed=0)
        for std in (0.5, 0.002)
    )
    few, many = (
        head_difficulty.simulated_steps(
            head.fit(ROWS, LABELS), 3, np.random.default_rng(0)
        )
        for head in (loud, quiet)
    )
    assert few == 0 < many
