import math

import numpy as np
import pytest

from opacus_pi.accounting.langevin.learning_phase import (
    contractive_divergence,
    halved_noise_divergence,
)
from opacus_pi.accounting.langevin.lsi import lsi_track
from opacus_pi.accounting.langevin.shifted import learn_unlearn_mu_squared

C, S = 0.9, 0.5
PROCESS = {"lipschitz": C, "noise_variance": S}


def recursion(shifts, order, lsi, p, theta):
    """The theorem's recursion, one number at a time."""
    a, weight, total = order, 1.0, 0.0
    for t in reversed(range(len(shifts))):
        g = 1 + (1 - theta) * S / (C * C * lsi[t] + theta * S)
        a0 = 1 + (a - 1) / g
        weight *= a / (a0 * g)
        values = [
            math.exp(p * a0 * (a0 - 1) * d**2 / (2 * theta * S)) for d in shifts[t]
        ]
        total += weight * math.log(sum(values) / len(values)) / (p * (a0 - 1))
        a = 1 + (a0 - 1) * p / (p - 1)
    return total


@pytest.mark.parametrize("theta", [0.2, 0.5, 0.9])
def test_against_the_recursion(theta):
    rng = np.random.default_rng(0)
    shifts, lsi = rng.uniform(0.01, 0.2, (12, 5)), lsi_track(0.0, 12, **PROCESS)
    found = contractive_divergence(
        shifts, 3.0, lsi=lsi, hoelder_p=8.0, noise_share=theta, **PROCESS
    )
    assert found == pytest.approx(recursion(shifts, 3.0, lsi, 8.0, theta), rel=1e-12)


def test_examples_are_independent_columns():
    rng = np.random.default_rng(1)
    shifts, lsi = rng.uniform(0.01, 0.2, (6, 4, 3)), lsi_track(0.1, 6, **PROCESS)
    shared = {"lsi": lsi, "hoelder_p": 8.0, **PROCESS}
    many = contractive_divergence(shifts, 3.0, **shared)
    alone = [contractive_divergence(shifts[..., i], 3.0, **shared) for i in range(3)]
    assert many == pytest.approx(alone, rel=1e-14)


def test_removal_only_contracts():
    """After the last use the divergence falls like the hyper-contractive bound."""
    lsi = lsi_track(0.1, 30, **PROCESS)
    shared = {"hoelder_p": math.inf, **PROCESS}
    learned = np.full((10, 1), 0.2)
    values = [
        contractive_divergence(
            np.r_[learned, np.zeros((k, 1))], 4.0, lsi=lsi[: 10 + k + 1], **shared
        )
        for k in range(0, 21, 5)
    ]
    assert (np.diff(values) < 0).all()
    assert values[-1] < values[0] * C ** (2 * 15)


def test_bounded_however_long_and_near_the_exact_value():
    """A constant shift on a quadratic: the exact μ² is the shifted divergence's."""
    exact = learn_unlearn_mu_squared(C, 0.1, 2000, 0, S)
    lsi = lsi_track(0.0, 2000, **PROCESS)
    found = contractive_divergence(
        np.full((2000, 1), 0.1), 4.0, lsi=lsi, hoelder_p=math.inf, **PROCESS
    )
    assert 4 * exact / 2 <= found <= 3 * 4 * exact / 2


def test_recursion_beats_the_worst_case_form():
    lsi = lsi_track(0.0, 50, **PROCESS)
    worst = halved_noise_divergence(np.full(50, 0.1), 4.0, lsi=lsi, **PROCESS)
    ours = contractive_divergence(
        np.full((50, 1), 0.1), 4.0, lsi=lsi, hoelder_p=math.inf, **PROCESS
    )
    assert ours < worst


def test_hoelder_p_between_mean_and_largest():
    shifts, lsi = np.array([[0.1, 0.3]] * 5), lsi_track(0.0, 5, **PROCESS)
    largest = contractive_divergence(
        shifts, 2.0, lsi=lsi, hoelder_p=math.inf, **PROCESS
    )
    top = contractive_divergence(
        shifts.max(axis=1, keepdims=True), 2.0, lsi=lsi, hoelder_p=math.inf, **PROCESS
    )
    assert largest == top
    averaged = contractive_divergence(shifts, 2.0, lsi=lsi, hoelder_p=20.0, **PROCESS)
    assert averaged < largest


def test_no_shift_has_no_loss_and_extreme_contraction_is_finite():
    lsi = lsi_track(0.1, 5, **PROCESS)
    for p in (2.0, math.inf):
        shared = {"lsi": lsi, "hoelder_p": p, **PROCESS}
        assert contractive_divergence(np.zeros((5, 1)), 2.0, **shared) == 0
    long = np.r_[np.full((5, 1), 0.1), np.zeros((5000, 1))]
    lsi = lsi_track(0.1, 5005, **PROCESS)
    for p in (2.0, math.inf):
        assert contractive_divergence(long, 2.0, lsi=lsi, hoelder_p=p, **PROCESS) == 0


def test_bad_input():
    good = {"lsi": np.ones(3), "hoelder_p": 5.0, **PROCESS}
    shifts = np.ones((3, 1))
    with pytest.raises(ValueError, match=r"\(T, runs\)"):
        contractive_divergence(np.ones(3), 2.0, **good)
    with pytest.raises(ValueError, match="lsi must .*got an array of shape"):
        contractive_divergence(shifts, 2.0, **good | {"lsi": np.ones(5)})
    with pytest.raises(ValueError, match="hoelder_p must be above 1, got 1.0"):
        contractive_divergence(shifts, 2.0, **good | {"hoelder_p": 1.0})
    with pytest.raises(ValueError, match="noise_share must .*got 1"):
        contractive_divergence(shifts, 2.0, noise_share=1.0, **good)
    with pytest.raises(ValueError, match="noise_variance must .*got 0"):
        contractive_divergence(shifts, 2.0, **good | {"noise_variance": 0.0})
    with pytest.raises(ValueError, match="order must .*got 1.0"):
        contractive_divergence(shifts, 1.0, **good)
    with pytest.raises(ValueError, match="order must .*got 1.0"):
        halved_noise_divergence(np.ones(3), 1.0, lsi=np.ones(3), **PROCESS)
    with pytest.raises(ValueError, match="shifts must .*got -1"):
        contractive_divergence(-shifts, 2.0, **good)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_without_a_constant_nothing_contracts(num_steps):
    """An unknown constant is an infinite one: what is left is composition."""
    shifts = np.full((num_steps, 1), 0.1)
    found = contractive_divergence(
        shifts, 3.0, lsi=np.full(num_steps, math.inf), hoelder_p=math.inf, **PROCESS
    )
    assert found == pytest.approx(num_steps * 3 * 0.1**2 / (2 * 0.5 * S), rel=1e-12)
