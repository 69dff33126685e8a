import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.langevin.lsi import (
    bounded_support_lsi,
    gradient_map_lipschitz,
    log_growth,
    lsi_track,
)


@given(st.floats(0.01, 3.0), st.floats(-2.0, 2.0), st.floats(0.0, 3.0))
def test_gradient_map_lipschitz_is_the_largest_stretch(eta, m, extra):
    L = abs(m) + extra
    curvatures = np.linspace(m, L, 101)
    slow = np.abs(1 - eta * curvatures).max()
    found = gradient_map_lipschitz(eta, smoothness=L, strong_convexity=m)
    assert found == pytest.approx(slow, rel=1e-12)


def test_convex_losses_do_not_expand_and_smooth_ones_by_one_plus_eta_l():
    assert gradient_map_lipschitz(0.5, smoothness=4.0) == 1
    assert gradient_map_lipschitz(0.5, smoothness=4.0, strong_convexity=-4.0) == 3


def test_track_follows_the_variance_of_a_gaussian():
    variance, expected = 0.3, [0.3]
    for c, s in ((0.9, 0.1), (1.2, 0.5), (0.5, 0.0)):
        variance = c * c * variance + s
        expected.append(variance)
    track = lsi_track(0.3, 3, lipschitz=[0.9, 1.2, 0.5], noise_variance=[0.1, 0.5, 0.0])
    assert track == pytest.approx(expected, rel=1e-14)


def test_growth_telescopes():
    """Π (1 + s/(c²C_j)) = C_k/(c^{2k}·C_0)."""
    shared = {"lipschitz": 0.95, "noise_variance": 0.02}
    track = lsi_track(0.7, 200, **shared)
    expected = np.log(track / track[0]) - 2 * np.arange(201) * math.log(0.95)
    assert log_growth(track, **shared) == pytest.approx(expected, abs=1e-11)


def test_cap_holds_and_helps():
    shared = {"lipschitz": 1.5, "noise_variance": 0.1}
    capped = lsi_track(0.1, 30, cap=2.0, **shared)
    assert capped.max() == 2.0
    free = lsi_track(0.1, 30, **shared)
    assert log_growth(capped, **shared)[-1] > log_growth(free, **shared)[-1]


def test_edges():
    point = lsi_track(0.0, 1, lipschitz=0.9, noise_variance=0.1)
    assert log_growth(point, lipschitz=0.9, noise_variance=0.1).tolist() == [
        0,
        math.inf,
    ]
    unknown = lsi_track(math.inf, 2, lipschitz=0.9, noise_variance=0.1)
    assert log_growth(unknown, lipschitz=0.9, noise_variance=0.1).tolist() == [0, 0, 0]
    constant = lsi_track(math.inf, 1, lipschitz=0.0, noise_variance=0.1)
    assert constant.tolist() == [math.inf, 0.1]
    silent = lsi_track(1.0, 2, lipschitz=1.0, noise_variance=0.0)
    assert log_growth(silent, lipschitz=1.0, noise_variance=0.0).tolist() == [0, 0, 0]
    assert lsi_track(1.0, 0, lipschitz=1.0, noise_variance=0.0).tolist() == [1.0]


def test_bounded_support_contains_the_gaussian_case_and_overflows_to_inf():
    assert bounded_support_lsi(0.0, 0.3) >= 0.3
    assert bounded_support_lsi(100.0, 0.01) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lsi_track(-1.0, 2, lipschitz=1, noise_variance=1),
            "initial must .*got -1",
        ),
        (
            lambda: lsi_track(1.0, 2, lipschitz=-1, noise_variance=1),
            "lipschitz must .*got -1",
        ),
        (
            lambda: lsi_track(1.0, 2, lipschitz=[1, 1, 1], noise_variance=1),
            r"shape \(2,\)",
        ),
        (
            lambda: gradient_map_lipschitz(0.1, smoothness=1.0, strong_convexity=2.0),
            "strong_convexity must .*got 2",
        ),
        (
            lambda: gradient_map_lipschitz(0.0, smoothness=1.0),
            "learning_rate must .*got 0",
        ),
        (lambda: bounded_support_lsi(1.0, 0.0), "noise_variance must .*got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
