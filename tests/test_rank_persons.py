"""Persons are ranked by the largest loss of their examples, beside a bound for all."""

import math

import numpy as np
import pytest

from opacus_pi.accounting import GradNormLedger, NoisySGD, epsilons, privacy_losses
from opacus_pi.accounting.training_bound import training_epsilon
from opacus_pi.report import rank_persons, score

NORMS = [0.1, 5.0, 0.4, 5.0, 0.2, 0.3, 5.0]
MECHANISM = NoisySGD(100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
LEDGER = GradNormLedger(MECHANISM, steps=[100], grad_norms=[NORMS])
OWNERS = {"ada": [0, 2], "ben": [1], "eve": [5, 3, 4], "out": [], 7: [0]}


def test_a_person_has_the_largest_of_the_examples_and_a_bound_for_as_many():
    rows = rank_persons(LEDGER, OWNERS, order=4.0, delta=1e-4)
    assert [row.person for row in rows] == ["eve", "ben", "ada", "7"]
    losses, own = privacy_losses(LEDGER, 4.0), epsilons(LEDGER, 1e-4)
    for row in rows:
        at = OWNERS.get(row.person, [0])
        assert row.num_examples == len(at)
        bound = training_epsilon([LEDGER], len(at), 1e-4)
        assert row.loss == losses[at].max()
        assert row.epsilon == min(own[at].max(), bound)
        assert row.group_epsilon == pytest.approx(bound, rel=1e-12)
        assert row.group_epsilon >= row.epsilon


def test_positions_are_those_of_the_data_set():
    part = GradNormLedger(
        MECHANISM, [100], [[0.1, 5.0, 0.4]], example_ids=np.array([30, 10, 20])
    )
    rows = rank_persons(part, {"ada": [20, 30], "ben": [10]})
    assert [row.person for row in rows] == ["ben", "ada"]
    assert rows[1].loss == privacy_losses(part, 8.0)[[0, 2]].max()


def test_without_a_bound_there_is_only_a_ranking():
    plain = GradNormLedger(NoisySGD(100, 0.1, 0.0, 1.0), [100], [NORMS])
    rows = rank_persons(plain.with_noise_std(1.0), OWNERS)
    assert {(row.epsilon, row.group_epsilon) for row in rows} == {(None, None)}
    unclipped = NoisySGD(100, 0.1, 2.0, math.inf)
    rows = rank_persons(GradNormLedger(unclipped, [100], [NORMS]), OWNERS)
    assert {row.group_epsilon for row in rows} == {None}


def test_scores_need_not_be_computed_again():
    found = score(LEDGER, order=4.0)
    again = rank_persons(LEDGER, OWNERS, scores=found)
    assert again == rank_persons(LEDGER, OWNERS, order=4.0)
    assert rank_persons(LEDGER, {}) == []


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([0, 7], "owners must list examples of the ledger.* got position 7 for ada"),
        ([-1], "got position -1 for ada"),
        ([0, 0], "owners must map each person to a list of different positions"),
        ([0.5], "owners must map each person"),
        (3, "owners must map each person"),
    ],
)
def test_bad_owners(examples, message):
    with pytest.raises(ValueError, match=message):
        rank_persons(LEDGER, {"ada": examples})
