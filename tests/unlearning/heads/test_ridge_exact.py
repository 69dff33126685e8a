"""Certificates of ridge heads: exact, compared with laws computed step by step."""

import numpy as np
import pytest

from opacus_pi.accounting.conversion import rdp_to_epsilon
from tests.unlearning.heads.extended_precision import (
    MORE_PRECISE,
    delta_at,
    divergences,
    log_ratio,
    sampled,
)
from tests.unlearning.heads.problems import Ridge

PROBLEMS = 200
FEW = 60  # of them, for the slowest comparison
TOLERANCE = 1e-8
DELTA = 1e-2  # large enough to be simulated


@pytest.fixture(scope="module")
def cases():
    """Problems, the guarantee after their last request, and the two laws."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(PROBLEMS):
        problem = Ridge.random(rng)
        head = problem.head()
        for indices, num_steps in problem.requests:
            claim = head.forget(indices, num_steps=num_steps, delta=DELTA)
        found.append((claim, *problem.laws()))
    return found


def both(claim, delta=1e-5):
    """The larger ε of the two directions."""
    return max(claim.epsilon(delta), claim.reverse_epsilon(delta))


@pytest.mark.skipif(not MORE_PRECISE, reason="long double is no longer than float64")
def test_divergences_equal_those_of_extended_precision(cases):
    for claim, unlearned, retrained in cases:
        orders = np.array(claim.orders)
        for found, laws in (
            (claim.divergences, (unlearned, retrained)),
            (claim.reverse_divergences, (retrained, unlearned)),
        ):
            exact = divergences(*laws, orders)
            finite = np.isfinite(exact)
            assert (np.isfinite(found) == finite).all()
            own = np.array(found)[finite]
            np.testing.assert_allclose(own, exact[finite], TOLERANCE, atol=1e-13)
            pair = (
                float(rdp_to_epsilon(values, orders[finite], 1e-5))
                for values in (own, exact[finite])
            )
            assert next(pair) == pytest.approx(next(pair), rel=TOLERANCE, abs=1e-12)


def test_reported_epsilon_is_the_one_at_which_delta_is_reached(cases):
    """δ(ε) from the full laws, on a line and with a step that are not the library's."""
    compared = 0
    for claim, *laws in cases[:FEW]:
        epsilon, found = both(claim, DELTA), []
        for first, second in (laws, laws[::-1]):
            delta, slope, missing = delta_at(first, second, epsilon)
            if missing < 1e-10 * DELTA:
                found.append((delta, slope))
        if len(found) < 2 or epsilon == 0:
            continue  # the integrand falls slowly: few columns and dimensions
        compared += 1
        delta, slope = max(found)
        assert delta <= DELTA * (1 + 1e-9)
        assert (DELTA - delta) / slope <= TOLERANCE * epsilon
    assert compared > FEW / 3


def test_epsilon_is_never_below_a_simulation_by_more_than_its_error(cases):
    rng = np.random.default_rng(8)
    for claim, *laws in cases:
        epsilon = both(claim, DELTA)
        found = []
        for first, second in (laws, laws[::-1]):
            ratio = log_ratio(first, second, sampled(first, rng, 4_000))
            gain = -np.expm1(np.minimum(epsilon - ratio, 0))
            found.append((gain.mean() - DELTA, gain.std() / 63))
            assert found[-1][0] < 5 * found[-1][1] + 1e-6
        if epsilon > 0:  # and not far above: one direction attains δ
            assert max(found)[0] > -5 * max(found)[1] - DELTA / 20


def test_weights_follow_the_law_that_is_certified():
    problem = Ridge.random(np.random.default_rng(3))
    rng, found = np.random.default_rng(4), []
    for _ in range(300):
        head = problem.head(seed=rng)
        for indices, num_steps in problem.requests:
            head.forget(indices, num_steps=num_steps)
        found.append(head.coef_)
    (mean, cov), _ = problem.laws()
    lower = np.linalg.cholesky(cov.astype(float))
    scaled = np.linalg.solve(lower, np.array(found) - mean.astype(float))
    count = len(scaled) * scaled.shape[2]
    assert np.abs(scaled.mean(axis=(0, 2))).max() < 4.5 / np.sqrt(count)
    second = np.einsum("nim,njm->ij", scaled, scaled) / count
    assert np.abs(second - np.eye(len(second))).max() < 6.5 / np.sqrt(count)


def test_steps_and_cost_agree_with_epsilons():
    problem = Ridge.random(np.random.default_rng(5))
    head = problem.head()
    for place, k in enumerate(head.steps_to(0.3).tolist()):
        assert head.epsilons(num_steps=k, indices=[place])[0] <= 0.3
        if k > 0:
            assert head.epsilons(num_steps=k - 1, indices=[place])[0] > 0.3
        cost = head.cost([place], epsilon=0.3)
        assert abs(cost.num_steps - k) <= 1  # the compression rounds up
        assert cost.epsilon <= 0.3
        assert cost.num_retraining_steps == problem.settings["num_steps"]


def test_more_steps_lower_epsilon_and_the_ranking_sorts_it():
    head = Ridge.random(np.random.default_rng(6)).head()
    values = head.epsilons(num_steps=[0, 1, 5, 50])
    assert (np.diff(values, axis=0) <= 1e-9).all()
    assert (np.diff(values[0][head.ranking()]) <= 0).all()
    some = [3, 0]
    np.testing.assert_allclose(head.epsilons(indices=some), values[0][some], 1e-9)


def test_later_requests_cover_earlier_ones():
    problem = Ridge.random(np.random.default_rng(11))
    head = problem.head()
    head.forget([0], num_steps=0)
    alone = head.epsilons(indices=[1, 2])
    claim = head.forget([2], num_steps=0, delta=1e-5)
    assert both(claim) == pytest.approx(alone[1], rel=1e-9)
    assert head.remaining.tolist() == [1, *range(3, len(problem.rows))]
    assert len(head._features) == len(head.remaining)  # rows are erased


def test_a_target_is_met_and_no_fewer_steps_meet_it():
    problem = Ridge.random(np.random.default_rng(12))
    cost = problem.head().cost([0, 1], epsilon=0.2)
    claim = problem.head().forget([0, 1], epsilon=0.2)
    assert both(claim) == pytest.approx(cost.epsilon)
    assert cost.epsilon <= 0.2 < cost.epsilon_before
    few = problem.head().forget([0, 1], num_steps=cost.num_steps - 1)
    assert both(few) > 0.2


def test_the_guarantee_lists_what_only_the_caller_knows():
    claim = Ridge.random(np.random.default_rng(13)).head().forget([0], num_steps=2)
    assert claim.kind == "certified if"
    assert len(claim.declarations) == 4 and not claim.unmet
    assert "2 noisy ridge steps" in claim.method and "was given" in str(claim)
    claim = Ridge.random(np.random.default_rng(13)).head().forget([0], epsilon=0.5)
    assert "this number was computed from the rows to forget" in str(claim)
