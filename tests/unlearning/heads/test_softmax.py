"""Softmax heads: constants, bounds against exact cases, and requests in any order."""

import numpy as np
import pytest
import torch

from opacus_pi.accounting.langevin import shifted_mu_squared
from opacus_pi.unlearning.heads import SoftmaxHead, unit_rows

RNG = np.random.default_rng(0)
LABELS = RNG.integers(4, size=40)
ROWS = unit_rows(RNG.normal(size=(40, 6)) + 2 * np.eye(6)[LABELS], bound=3.0)


def fitted(**settings):
    settings = {"num_steps": 60, "regularisation": 0.05, "seed": 0} | settings
    return SoftmaxHead(num_classes=4, **settings).fit(ROWS, LABELS)


def autograd_loss(weights, rows, labels, denominator, penalty):
    scores = torch.as_tensor(rows) @ weights
    total = torch.nn.functional.cross_entropy(
        scores, torch.as_tensor(labels), reduction="sum"
    )
    return total / denominator + penalty / 2 * weights.square().sum()


def test_gradient_equals_that_of_autograd():
    head = fitted(denominator=50)
    weights = torch.tensor(RNG.normal(size=(6, 4)), requires_grad=True)
    autograd_loss(weights, ROWS, LABELS, 50, 0.05).backward()
    found = head._gradient(weights.detach().numpy())
    np.testing.assert_allclose(found, weights.grad.numpy(), rtol=1e-12)


def test_hessian_and_gradients_stay_within_the_constants():
    """At many weights, for rows of norm 1: the curvature and the norm of a gradient."""
    rows = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    for scale in (0.0, 1.0, 30.0):
        weights = torch.tensor(scale * RNG.normal(size=(6, 4)))
        hessian = torch.autograd.functional.hessian(
            lambda w: autograd_loss(w, rows, LABELS, 40, 0.05), weights
        )
        values = np.linalg.eigvalsh(hessian.reshape(24, 24).numpy())
        assert 0.05 - 1e-12 <= values.min() and values.max() <= 0.55
        weights.requires_grad_()
        for i in range(5):
            loss = autograd_loss(weights, rows[i : i + 1], LABELS[i : i + 1], 1, 0.0)
            (gradient,) = torch.autograd.grad(loss, weights)
            assert gradient.norm() <= np.sqrt(2)


def test_epsilons_follow_the_schedule_of_shifts():
    head = fitted()
    eta, some = head.learning_rate, [3, 9]
    found = head.epsilons(num_steps=[0, 25], indices=some)
    for column, i in enumerate(some):
        move = eta * np.sqrt(2) * np.linalg.norm(ROWS[i]) / 40
        shifts = np.r_[np.full(60, move), np.zeros(25)]
        mu2 = shifted_mu_squared(
            np.full(85, 1 - eta * 0.05), shifts, np.full(85, 0.02**2)
        )
        orders = 1 + np.geomspace(0.01, 1e6, 4000)
        offset = np.log1p(-1 / orders) - (np.log(1e-5) + np.log(orders)) / (orders - 1)
        best = (orders * mu2 / 2 + offset).min()
        assert found[1, column] == pytest.approx(best, rel=5e-3)
    assert (found[1] < found[0]).all()


def test_sets_cost_more_than_members_and_no_more_than_their_sum():
    head = fitted()
    pulls = [head._pull(np.array([i])) for i in (1, 2, 3)]
    together = head._pull(np.array([1, 2, 3]))
    assert max(pulls) < together <= sum(pulls) * (1 + 1e-9)
    rng = np.random.default_rng(1)
    for _ in range(50):  # no weights make the set pull harder than that
        weights = rng.normal(size=(6, 4)) * 10 ** rng.uniform(-1, 2)
        scores = ROWS[1:4] @ weights
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        pull = ROWS[1:4].T @ (shares - np.eye(4)[LABELS[1:4]])
        assert np.linalg.norm(pull) <= together


def test_requests_one_after_the_other_cost_at_most_the_joint_request():
    """The first set was away for longer, so its part has decayed more."""
    head = fitted()
    head.forget([1], num_steps=30)
    later = head.forget([2], num_steps=30).epsilon(1e-5)
    alone = fitted().forget([2], num_steps=30).epsilon(1e-5)
    joint = fitted()
    pull = joint._pull(np.array([1])) + joint._pull(np.array([2]))
    at_once = joint._mu_squared(pull, 30)
    assert alone < later <= np.inf
    head = fitted()
    head.forget([1], num_steps=30)
    assert head._mu_squared(head._pull(np.array([1])), 30) <= at_once * (1 + 1e-9)


def test_the_bound_covers_the_exact_case():
    """A row of zeros pulls nothing: the laws are equal, and ε is 0."""
    rows = ROWS.copy()
    rows[0] = 0
    head = SoftmaxHead(num_classes=4, num_steps=5, seed=0).fit(rows, LABELS)
    assert head.epsilons(indices=[0])[0] == 0
    assert head.forget([0], num_steps=0).epsilon(1e-5) == 0


def test_a_target_is_met_and_accuracy_stays():
    head = fitted(noise_std=0.01, num_steps=200)
    before = head.score(ROWS, LABELS)
    steps = head.steps_to(0.5)
    assert head.epsilons(num_steps=int(steps[7]), indices=[7])[0] <= 0.5
    assert head.cost([7], epsilon=0.5).num_steps == steps[7]
    claim = head.forget([7], epsilon=0.5)
    assert claim.kind == "certified if"
    assert claim.epsilon(1e-5) == claim.reverse_epsilon(1e-5) <= 0.5
    assert before > 0.8 and head.score(ROWS, LABELS) > before - 0.2
