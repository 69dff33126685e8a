import math

import numpy as np
import pytest

from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.contraction import hypercontractive_bound
from opacus_pi.accounting.langevin.lsi import lsi_track
from opacus_pi.accounting.langevin.unlearning import (
    steps_to_rewind,
    steps_to_unlearn,
    symmetric_bound,
    unlearning_divergence,
)

CONVEX = LangevinConstants(
    learning_rate=0.5, noise_variance=9e-4, smoothness=0.26, strong_convexity=0.01
)
BALL = LangevinConstants(
    learning_rate=0.1,
    noise_variance=0.3,
    smoothness=2.0,
    strong_convexity=-1.0,
    radius=1.0,
    gradient_bound=0.5,
)


def linear(order):
    return 0.6 * order


def slow_growth(constants, lsi, num_steps):
    total = 0.0
    for _ in range(num_steps):
        spread = constants.lipschitz**2 * lsi
        total += math.log1p(constants.noise_variance / spread)
        lsi = min(spread + constants.noise_variance, constants.lsi_cap)
    return total


@pytest.mark.parametrize("constants", [CONVEX, BALL])
@pytest.mark.parametrize("num_steps", [0, 1, 7, 300])
def test_hypercontractive_step_by_step(constants, num_steps):
    bound = unlearning_divergence(
        linear, 4.0, num_steps, constants, initial_lsi=0.05, form="hypercontractive"
    )
    growth = slow_growth(constants, 0.05, num_steps)
    expected = hypercontractive_bound(linear, 4.0, growth)
    assert bound.divergence == pytest.approx(expected, rel=1e-10)
    assert bound.order == 4.0
    assert bound.num_steps == num_steps


@pytest.mark.parametrize("form", ["hypercontractive", "source", "best"])
@pytest.mark.parametrize("divergence", [2.4, linear])
def test_steps_are_the_first_that_reach_the_target(form, divergence):
    shared = {"initial_lsi": 0.05, "form": form}
    found = steps_to_unlearn(divergence, 4.0, 0.01, CONVEX, **shared)
    steps = found.num_steps
    assert found.divergence <= 0.01
    before = unlearning_divergence(divergence, 4.0, steps - 1, CONVEX, **shared)
    assert before.divergence > 0.01
    again = unlearning_divergence(divergence, 4.0, steps, CONVEX, **shared)
    assert again == found


def test_best_is_the_smallest():
    shared = {"initial_lsi": BALL.lsi_cap}
    values = {
        form: unlearning_divergence(2.0, 3.0, 50, BALL, form=form, **shared).divergence
        for form in ("hypercontractive", "source", "dobrushin", "best")
    }
    assert values["best"] == min(values.values())
    found = steps_to_unlearn(2.0, 3.0, 0.1, BALL, **shared)
    each = [
        steps_to_unlearn(2.0, 3.0, 0.1, BALL, form=form, **shared).num_steps
        for form in ("hypercontractive", "dobrushin")
    ]
    assert found.num_steps == min(each)


def test_a_target_already_met_needs_no_step():
    found = steps_to_unlearn(0.005, 4.0, 0.01, CONVEX, initial_lsi=0.05)
    assert found.num_steps == 0
    assert found.divergence == pytest.approx(0.005)


def test_no_contraction_no_end():
    """An unknown constant and no ball: nothing is proven, and it says so."""
    found = steps_to_unlearn(2.0, 4.0, 0.01, CONVEX, max_num_steps=1000)
    assert found.num_steps == math.inf
    assert found.divergence == pytest.approx(2.0)


def test_assumptions_say_what_a_form_needs():
    hyper = unlearning_divergence(2.0, 3.0, 5, BALL, initial_lsi=1.0, form="source")
    assert any("log-Sobolev" in text for text in hyper.assumptions)
    assert any("1.1-Lipschitz" in text for text in hyper.assumptions)
    ball = unlearning_divergence(2.0, 3.0, 5, BALL, form="dobrushin")
    assert not any("log-Sobolev" in text for text in ball.assumptions)
    assert any("radius 1.05" in text for text in ball.assumptions)
    assert "as many steps as the unlearned model had in total" in ball.against


def test_rewind_contracts_from_the_checkpoint():
    total = 60
    shared = {"lipschitz": CONVEX.lipschitz, "noise_variance": CONVEX.noise_variance}
    lsi = lsi_track(0.0, total, **shared)

    def after(t, order):
        return 0.02 * t * order

    found = steps_to_rewind(after, 3.0, 0.1, CONVEX, lsi)
    values = []
    for k in range(total + 1):
        start = total - k
        growth = slow_growth(CONVEX, lsi[start], k) if start else math.inf
        values.append(
            hypercontractive_bound(lambda a, s=start: after(s, a), 3.0, growth)
        )
    first = next(k for k, value in enumerate(values) if value <= 0.1)
    assert found.num_steps == first
    assert found.divergence == pytest.approx(values[first], rel=1e-9)
    assert "original training" in found.against


def test_rewind_says_when_not_even_the_start_is_near_enough():
    found = steps_to_rewind(lambda t, a: 1.0, 3.0, 0.1, CONVEX, num_steps=5)
    assert (found.num_steps, found.divergence) == (math.inf, 1.0)


def test_rewind_without_constants_is_post_processing():
    found = steps_to_rewind(
        lambda t, order: 0.02 * t * order, 3.0, 0.1, CONVEX, num_steps=60
    )
    assert found.num_steps == 59  # One step: 0.06; two: 0.12.
    assert found.divergence == pytest.approx(0.06)


def test_symmetric_takes_the_larger_and_both_lists():
    forward = unlearning_divergence(2.0, 3.0, 5, BALL, initial_lsi=1.0, form="source")
    backward = unlearning_divergence(3.0, 3.0, 5, BALL, form="dobrushin")
    both = symmetric_bound(forward, backward)
    assert both.divergence == max(forward.divergence, backward.divergence)
    assert set(both.assumptions) == {*forward.assumptions, *backward.assumptions}
    other = unlearning_divergence(3.0, 3.0, 6, BALL, form="dobrushin")
    with pytest.raises(ValueError, match="backward must .*got order 3.0, 6 steps"):
        symmetric_bound(forward, other)


def test_without_smoothness_dobrushin_remains():
    rough = LangevinConstants(
        learning_rate=0.1,
        noise_variance=0.3,
        smoothness=math.inf,
        radius=1.0,
        gradient_bound=0.5,
    )
    assert rough.map_radius == pytest.approx(1.05)
    found = unlearning_divergence(2.0, 3.0, 5, rough)
    assert found.form == "dobrushin"
    assert found.divergence < 2.0
    hyper = unlearning_divergence(
        2.0, 3.0, 5, rough, initial_lsi=0.3, form="hypercontractive"
    )
    capped = slow_growth(rough, math.inf, 5)
    expected = hypercontractive_bound(2.0, 3.0, capped)
    assert hyper.divergence == pytest.approx(expected)


def test_constants():
    assert BALL.lipschitz == pytest.approx(1.1)
    assert BALL.map_radius == pytest.approx(1.05)
    assert CONVEX.lsi_cap == math.inf
    assert CONVEX.log_dobrushin == 0
    assert BALL.log_dobrushin < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_variance": 0.0}, "noise_variance must .*got 0"),
        (
            {"smoothness": 0.1, "strong_convexity": 0.2},
            "strong_convexity must .*got 0.2",
        ),
        ({"learning_rate": -1.0}, "learning_rate must .*got -1"),
        ({"radius": 0.0}, "radius must .*got 0"),
        ({"gradient_bound": 0.0}, "gradient_bound must .*got 0"),
    ],
)
def test_bad_constants(change, message):
    good = {"learning_rate": 0.1, "noise_variance": 0.1, "smoothness": 1.0}
    with pytest.raises(ValueError, match=message):
        LangevinConstants(**good | change)


def test_bad_input():
    with pytest.raises(ValueError, match="form must .*got 'fast'"):
        unlearning_divergence(1.0, 2.0, 1, CONVEX, form="fast")
    with pytest.raises(ValueError, match="target must .*got 0"):
        steps_to_unlearn(1.0, 2.0, 0.0, CONVEX)
    with pytest.raises(ValueError, match="num_steps must .*got None"):
        steps_to_rewind(lambda t, a: 1.0, 2.0, 0.1, CONVEX)
    with pytest.raises(ValueError, match="order must .*got 1"):
        unlearning_divergence(1.0, 1.0, 1, CONVEX)
    with pytest.raises(ValueError, match="initial_lsi must .*got 0"):
        unlearning_divergence(1.0, 2.0, 1, CONVEX, initial_lsi=0.0)
    with pytest.raises(ValueError, match="num_steps must .*got -1"):
        unlearning_divergence(1.0, 2.0, -1, CONVEX)


def test_more_steps_never_hurt():
    values = [
        unlearning_divergence(linear, 6.0, k, CONVEX, initial_lsi=0.1).divergence
        for k in range(0, 200, 10)
    ]
    assert (np.diff(values) < 0).all()
