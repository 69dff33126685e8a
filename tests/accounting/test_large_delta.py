"""A δ that is not below 1/n is said where ε is given, and only there."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pi import GradNormLedger, NoisySGD, Unlearner
from opacus_pi.accounting import epsilon_limits, epsilons
from opacus_pi.accounting.conversion import large_delta
from opacus_pi.accounting.statement import privacy_statement
from opacus_pi.report.scores import score
from opacus_pi.unlearning.heads import RidgeHead

SIZE = 40
SENTENCE = "is not below 1/n = 0.025"


@pytest.fixture(scope="module")
def ledger():
    mechanism = NoisySGD(20, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
    norms = np.random.default_rng(0).lognormal(-1, 1, (2, SIZE))
    return GradNormLedger(mechanism, steps=[10, 20], grad_norms=norms, source="swept")


def test_the_limit_is_one_over_the_number_of_examples():
    assert not large_delta(0.0249, SIZE)
    assert SENTENCE in large_delta(0.025, SIZE)
    assert "about 2 of the examples" in large_delta(0.05, SIZE)


@pytest.mark.parametrize("reading", [epsilons, epsilon_limits])
def test_readings_warn_once_at_the_line_that_asked(ledger, reading):
    ledger = replace(ledger, source="observed")  # swept rows have no limits
    with pytest.warns(UserWarning, match=SENTENCE) as caught:
        reading(ledger, 0.03)
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading(ledger, 0.02)


def test_a_statement_says_it(ledger):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = str(privacy_statement(ledger, [3], 0.03))
        assert SENTENCE in said
        assert SENTENCE in str(privacy_statement(ledger, [3, 4], 0.03))
        assert "1/n" not in str(privacy_statement(ledger, [3], 0.02))


def test_scores_say_it_unless_they_only_rank(ledger):
    assert SENTENCE in score(ledger, delta=0.03).facts(1)["large_delta"]
    assert not score(ledger, delta=0.02).large_delta
    assert not score(ledger.with_noise_std(1.0), delta=0.03).large_delta


def test_plans_and_unlearning_say_it_where_there_is_a_number(ledger):
    data = TensorDataset(torch.randn(SIZE, 3), torch.arange(SIZE) % 2)
    loss = torch.nn.CrossEntropyLoss()
    known = Unlearner(torch.nn.Linear(3, 2), criterion=loss, ledger=ledger)
    plan = known.plan([3, 4], delta=0.03)
    assert SENTENCE in plan.text(0.03) and "1/n" not in plan.text(0.02)
    with pytest.warns(UserWarning, match=SENTENCE) as caught:
        known.unlearn(data, [3, 4], num_epochs=1, delta=0.03)
    assert [one.filename for one in caught] == [__file__]
    unknown = Unlearner(torch.nn.Linear(3, 2), criterion=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unknown.unlearn(data, [3, 4], num_epochs=1, delta=0.03)


def test_heads_warn():
    rows = np.random.default_rng(0).normal(size=(SIZE, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    head = RidgeHead(num_classes=2, noise_std=0.1, num_steps=5, regularisation=0.1)
    head.fit(rows, np.arange(SIZE) % 2)
    for reading in (head.epsilons, lambda delta: head.cost([1], delta=delta)):
        with pytest.warns(UserWarning, match=SENTENCE):
            reading(0.03)
