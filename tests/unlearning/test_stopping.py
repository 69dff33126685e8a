"""Adaptive unlearning: the budget from the privacy loss, the end from the evidence."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.evaluation import UnlearningTrace, time_to_unlearn
from opacus_pi.unlearning import FineTune, Plan, StopWhen, Unlearner


def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(30, 5), torch.arange(30) % 3)


def ledger():
    norms = np.random.default_rng(0).gamma(2.0, 0.2, size=(3, 30))
    return GradNormLedger(NoisySGD(30, 0.1, 2.0, 1.0), [10, 20, 30], norms)


def unlearner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return Unlearner(
        model,
        criterion=nn.CrossEntropyLoss(),
        method=FineTune(),
        ledger=ledger(),
        generator=torch.Generator().manual_seed(0),
    )


def says(*values):
    """An evaluation that returns these numbers one after the other."""
    scores = iter(values)
    return lambda model: {"score": next(scores)}


def unlearn(values, stop, num_epochs=5):
    return unlearner().unlearn(
        data(), [3], num_epochs, says(*values), batch_size=10, stop=stop
    )


@pytest.mark.parametrize(
    "values, patience, num_epochs",
    [
        ([0.9, 0.7, 0.52, 9, 9, 9], 1, 2),
        ([0.9, 0.52, 0.7, 0.52, 0.48, 9], 2, 4),
        ([0.5, 9, 9, 9, 9, 9], 1, 0),  # there before the first update
        ([0.9] * 6, 1, 5),  # never: the budget ends it
        ([0.9, np.nan, 0.5, 9, 9, 9], 1, 2),
    ],
)
def test_the_run_ends_with_the_evidence(values, patience, num_epochs):
    stop = StopWhen("score", 0.5, patience=patience)
    result = unlearn(values, stop)
    assert result.trace.times == list(range(num_epochs + 1))
    assert result.record["num_steps"] == 3 * num_epochs
    assert json.loads(json.dumps(result.record))["stop"]["patience"] == patience


def test_until_it_ends_the_run_is_the_one_without_stopping():
    stopped = unlearn([1, 1, 0.5], StopWhen("score", 0.5))
    fixed = unlearn([1, 1, 0.5], None, num_epochs=2)
    assert fixed.record["stop"] is None
    for a, b in zip(stopped.model.parameters(), fixed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_there_means_what_time_to_unlearn_means():
    trace = UnlearningTrace([0, 1, 2], {"gaussian_unlearning_score": [1.0, 0.2, 0.04]})
    name = "gaussian_unlearning_score"
    assert time_to_unlearn(trace, 0.0, metric=name) == 2
    assert StopWhen(name, 0.0).reached(trace)
    assert not StopWhen(name, 0.0, tolerance=0.03).reached(trace)
    assert not StopWhen(name, 0.0, patience=2).reached(trace)
    assert not StopWhen(name, 1.0, patience=4).reached(trace)


def test_stopping_costs_the_claim_whether_or_not_the_run_was_ended():
    fixed = unlearn([1] * 6, None).guarantee
    assert fixed.kind == "certified if"
    ended, not_ended = (
        unlearn(values, StopWhen("score", 0.5)).guarantee
        for values in ([1, 0.5], [1] * 6)
    )
    assert str(ended) == str(not_ended)
    assert ended.kind == "empirical"
    assert any("number of updates" in a.statement for a in ended.unmet)
    others = [a for a in ended.assumptions if "number of updates" not in a.statement]
    assert set(others) <= set(fixed.assumptions)


def test_stopping_needs_evaluations():
    with pytest.raises(
        ValueError, match="evaluate must be given if stop is given, got None"
    ):
        unlearner().unlearn(data(), [3], stop=StopWhen("score", 0.5))
    with pytest.raises(ValueError, match="metric must .*got 'other'"):
        unlearn([1] * 6, StopWhen("other", 0.5))


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"target": np.inf}, "target must .*got inf"),
        ({"target": 0.0, "tolerance": -1}, "tolerance must .*got -1"),
        ({"target": 0.0, "patience": 0}, "patience must .*got 0"),
    ],
)
def test_impossible_rules_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        StopWhen("score", **numbers)


def test_the_budget_follows_the_prediction():
    def plan(epochs) -> Plan:
        past = [] if epochs is None else [([0, 1], epochs), ([2, 3], epochs)]
        return unlearner().plan([5, 6], past_runs=past)

    assert plan(None).budget() == 25
    assert plan(None).budget(default=7) == 7
    assert plan(3.4).budget() == 7
    assert plan(3.4).budget(factor=1) == 4
    assert plan(0.0).budget() == 1
    with pytest.raises(ValueError, match="factor must .*got 0"):
        plan(1.0).budget(factor=0)
