"""What an unlearner predicts and claims: plans and guarantees."""

import copy
import warnings

import numpy as np
import pytest
from torch import nn

from opacus_pi.accounting import privacy_losses
from opacus_pi.unlearning import Langevin, StopWhen
from tests.unlearning.unlearners import beside_data, data, ledger_of, unlearner


def test_plan_says_difficulty_and_cost():
    ledger = ledger_of(data())
    losses = privacy_losses(ledger, 4.0)
    hardest = np.argsort(losses)[-3:]
    plan = unlearner(ledger=ledger).plan(hardest, order=4.0, batch_size=10)
    assert plan.mean_loss == pytest.approx(losses[hardest].mean())
    below = (losses < plan.mean_loss).mean() * 100
    assert plan.percentile == pytest.approx(below)
    assert plan.num_retain == 27 and plan.steps_per_epoch == 3
    assert plan.predicted_epochs is None and "past runs" in plan.prediction
    assert not plan.ranking_only
    assert "% of all examples" in str(plan) and "not predicted" in str(plan)


def test_a_printed_plan_has_the_delta_that_it_was_made_for():
    mine = unlearner(ledger=ledger_of(data()))
    plan = mine.plan([0], delta=0.01)
    assert plan.delta == 0.01 and plan.guarantee.epsilon(0.01) < np.inf
    assert str(plan) == plan.text(0.01) != plan.text(0.001)
    assert "0.01" in str(plan)


def test_plan_predicts_from_past_runs():
    ledger = ledger_of(data())
    losses = privacy_losses(ledger, 8.0)
    order = np.argsort(losses)
    easy, hard = order[:3], order[-3:]
    logs = np.log([losses[easy].mean(), losses[hard].mean()])
    middle = order[14:17]
    plan = unlearner(ledger=ledger).plan(middle, past_runs=[(easy, 2.0), (hard, 10.0)])
    slope = 8.0 / (logs[1] - logs[0])
    expected = 2.0 + slope * (np.log(losses[middle].mean()) - logs[0])
    assert plan.predicted_epochs == pytest.approx(expected)
    assert plan.predicted_steps == np.ceil(expected * plan.steps_per_epoch)
    assert plan.predicted_examples == np.ceil(expected * plan.num_retain)


def test_plan_without_noise_is_a_ranking():
    mine = unlearner(ledger=ledger_of(data(), noise_std=0.0))
    with pytest.raises(ValueError, match="assumed_noise_std"):
        mine.plan([0])
    plan = mine.plan([0], assumed_noise_std=1.0)
    assert plan.ranking_only and plan.guarantee.kind == "empirical"
    assert "a ranking only" in str(plan)


def test_an_assumed_noise_never_looks_real():
    ledger = ledger_of(data()).with_noise_std(2.0)
    mine = unlearner(ledger=ledger)
    plan = mine.plan([6])
    assert plan.ranking_only and plan.mean_loss == privacy_losses(ledger, 8.0)[6]
    for claim in (plan.guarantee, mine.unlearn(data(), [6], 0).guarantee):
        assert claim.kind == "empirical" and claim.divergences == ()
        assert "assumed noise_std=2 on the sum" in str(claim)


def test_plan_needs_a_ledger():
    with pytest.raises(
        ValueError, match=r"plan\(\) needs a ledger, but none was given\. Record"
    ):
        unlearner().plan([0])


def test_plan_finds_the_columns_of_a_partial_ledger():
    full = ledger_of(data())
    some = full.subset([20, 4, 11])
    plan = unlearner(ledger=some).plan([11])
    assert plan.mean_loss == pytest.approx(privacy_losses(full, 8.0)[11])
    with pytest.raises(ValueError, match="examples of the ledger"):
        unlearner(ledger=some).plan([5])


def test_one_example_of_a_noisy_run_without_clipping_gives_an_estimate():
    ledger = ledger_of(data(), clip=np.inf)
    claim = unlearner(ledger=ledger, method=Langevin(0.1)).unlearn(data(), [6], 1)
    claim = claim.guarantee
    assert claim.kind == "estimate"
    for order, divergence in zip(claim.orders, claim.divergences, strict=True):
        assert divergence == pytest.approx(privacy_losses(ledger, order)[6])
    assert 0 < claim.epsilon(1e-5) < np.inf
    assert any("upper bound" in a.statement for a in claim.unmet)


def batch_norm_net():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "options, indices, unmet",
    [
        ({"clip": np.inf}, [1, 2], "the estimate needs a single example"),
        ({"noise_std": 0.0}, [1], "training added noise"),
        ({"model": batch_norm_net()}, [1], "its own gradient only"),
        ({"ledger": None}, [1], "training added noise"),
    ],
)
def test_otherwise_nothing_finite_is_claimed(options, indices, unmet):
    facts = {k: options.pop(k) for k in ("noise_std", "clip") if k in options}
    ledger = ledger_of(data(), **facts)
    mine = unlearner(**({"ledger": ledger} | options))
    claim = mine.unlearn(data(), indices, 0).guarantee
    assert claim.kind == "empirical" and claim.divergences == ()
    assert any(unmet in a.statement for a in claim.unmet)


def test_a_second_request_is_judged_with_the_first():
    mine = unlearner(ledger=ledger_of(data(), clip=np.inf))
    assert mine.unlearn(data(), [1], 0).guarantee.kind == "estimate"
    with pytest.warns(UserWarning, match="nothing new"):
        assert mine.unlearn(data(), [1], 0).guarantee.kind == "estimate"
    assert mine.unlearn(data(), [2], 0).guarantee.kind == "empirical"


def test_several_runs_of_one_training():
    runs = [ledger_of(data(), seed=s, clip=np.inf) for s in (0, 1)]
    mine = unlearner(ledger=runs)
    claim = mine.unlearn(data(), [6], 0).guarantee
    for order, found in zip(claim.orders[::9], claim.divergences[::9], strict=True):
        assert found == pytest.approx(privacy_losses(runs, order)[6])
    assert copy.deepcopy(mine.plan([6])).guarantee.kind == "estimate"


def assert_promises_no_more(plan, run, size=30):
    """The plan's count and claim are those of the run that follows it."""
    record = run.record
    gone = {*record["forget_indices"], *record["forgotten_before"]}
    assert plan.num_retain == size - len(gone)
    assert beside_data(plan.guarantee) == beside_data(run.guarantee)


@pytest.mark.parametrize(
    ("before", "request_", "line"),
    [
        ([], [8], "Mean privacy loss"),
        ([1, 2, 3], [8], "The guarantee covers 4 examples: 1 new, and 3 forgotten b"),
        (
            [1, 2, 3],
            [2, 3, 8],
            "2 of the 3 were forgotten before. The guarantee covers",
        ),
        ([1], [1, 8], "1 of the 2 was forgotten before. The guarantee covers 2 ex"),
        ([8], [8], "All of them were forgotten before: nothing new to forget."),
        ([1, 8], [8], "All of them were forgotten before: nothing new to forget."),
    ],
)
@pytest.mark.filterwarnings("ignore:Every example to forget")
def test_a_plan_never_promises_more_than_the_run(before, request_, line):
    mine = unlearner(ledger=ledger_of(data()))
    if before:
        mine.unlearn(data(), before, 1)
    plan = mine.plan(request_)
    assert plan.forgotten_before.tolist() == before
    assert plan.forgotten_again.tolist() == sorted({*before} & {*request_})
    assert f"Examples to forget: {len(request_)}, to keep: " in str(plan)
    assert str(plan).splitlines()[1].startswith(line)
    assert_promises_no_more(plan, mine.unlearn(data(), request_, 1))


def test_what_was_forgotten_counts_in_a_partial_ledger():
    mine = unlearner(ledger=ledger_of(data()).subset([20, 4, 11]))
    mine.unlearn(data(), [4, 5], 0)
    assert mine.plan([11]).num_retain == 1  # of the three recorded, 4 and 11 are gone


def test_a_plan_leaves_something_to_keep():
    mine = unlearner(ledger=ledger_of(data()))
    mine.unlearn(data(), range(29), 0)
    with pytest.raises(ValueError, match="must leave at least one example to keep"):
        mine.plan([29])


def test_forgetting_again_is_said():
    mine = unlearner(ledger=ledger_of(data(), clip=np.inf))
    mine.unlearn(data(), [1, 2], 0)
    with pytest.warns(UserWarning, match="forgotten before: nothing new"):
        claim = mine.unlearn(data(), [2], 0).guarantee
    assert "this set has 2, including 2 forgotten before" in str(claim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.unlearn(data(), [2, 3], 1)


def test_a_run_that_was_stopped_by_evaluations_is_remembered():
    mine, never = unlearner(ledger=ledger_of(data())), StopWhen("m", target=9.0)
    mine.unlearn(data(), [8], 1, evaluate=lambda model: {"m": 0.0}, stop=never)
    plan = mine.plan([8])
    assert plan.guarantee.kind == "empirical"
    assert any("evaluation of 'm'" in a.evidence for a in plan.guarantee.unmet)


def test_a_plan_without_clipping_says_how_to_get_a_number_for_a_group():
    mine = unlearner(ledger=ledger_of(data(), clip=np.inf))
    assert "recording.gram_ledger measures groups" in str(mine.plan([1, 2]))
    assert "gram_ledger" not in str(mine.plan([1]))


def test_a_plan_without_past_runs_says_where_to_name_them():
    said = unlearner(ledger=ledger_of(data())).plan([1]).prediction
    assert "(past_runs, or --past on the command line)" in said
