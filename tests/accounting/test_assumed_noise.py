"""Losses of a run with assumed noise rank, and nothing is claimed from them."""

import math

import numpy as np
import pytest
from torch import nn

from opacus_pi import GradNormLedger, NoisySGD, Unlearner
from opacus_pi.accounting import (
    epsilons,
    privacy_losses,
    renyi_divergence,
    trajectory_limits,
)
from opacus_pi.difficulty.forget_sets import difficulty_strata
from opacus_pi.report import score, write_report

CRITERION = nn.CrossEntropyLoss()
MECHANISM = NoisySGD(2, 0.1, noise_std=2.0, max_grad_norm=1.0)
MADE = GradNormLedger(MECHANISM, [0, 1], [[0.1, 0.4, 5.0], [0.2, 0.3, 5.0]])
ASSUMED = MADE.with_noise_std(2.0)


@pytest.mark.parametrize("ledger", [ASSUMED, [ASSUMED, ASSUMED]], ids=["one", "two"])
@pytest.mark.parametrize(
    "claimed",
    [
        lambda ledger: epsilons(ledger, 1e-5),
        lambda ledger: trajectory_limits(ledger, 2.0, 2.0),
    ],
)
def test_claims_are_refused(ledger, claimed):
    with pytest.raises(
        ValueError,
        match="noise_std must .*got an assumed one.*use privacy_losses to rank",
    ):
        claimed(ledger)
    claimed([MADE, MADE])


def test_a_plan_says_that_it_only_ranks():
    model = nn.Linear(2, 2)
    plan = Unlearner(model, criterion=CRITERION, ledger=ASSUMED).plan([0])
    assert plan.ranking_only and "a ranking only" in str(plan)
    assert not Unlearner(model, criterion=CRITERION, ledger=MADE).plan([0]).ranking_only


def test_a_report_is_a_ranking(tmp_path):
    scores = score(ASSUMED)
    assert scores.ranking_only and scores.epsilons is None
    assert not score(MADE).ranking_only
    facts = write_report(tmp_path / "page.html", ledger=ASSUMED)
    assert facts["ranking_only"]
    page = (tmp_path / "page.html").read_text()
    assert "rank the examples" in page and "bound on" not in page


def test_ranking_works():
    losses = privacy_losses(ASSUMED, 8)
    assert np.array_equal(losses, privacy_losses(MADE, 8))
    assert difficulty_strata(losses, 1)["last"].tolist() == [2]


@pytest.mark.parametrize("size", [5, 21, 1000])
def test_the_count_of_adaptive_clipping_is_charged_too_little(size):
    """Why its noise is assumed: the exact law of the count against the charge.

    All gradients but one are unclipped. Opacus divides the noisy count by the true size
    of the batch, with the clipped example and without it.
    """
    noise_multiplier, std_of_count = 1.0, 0.51  # Opacus: noise_multiplier < 2 * std
    with_it = (size - 1) / size, std_of_count / size
    without = 1.0, std_of_count / (size - 1)
    exact = _gaussian_kl(*with_it, *without)
    charged = renyi_divergence(1 / noise_multiplier, 1.0, 1)
    assert charged == pytest.approx(0.5)
    assert exact > 2 * charged


def _gaussian_kl(mean, std, other_mean, other_std):
    ratio = (std / other_std) ** 2
    return 0.5 * (((mean - other_mean) / other_std) ** 2 + ratio - 1 - math.log(ratio))
