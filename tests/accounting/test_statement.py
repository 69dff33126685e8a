"""Statements for a person: numbers, words, and with whom they may be shared."""

import json
import math

import numpy as np
import pytest

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    epsilons,
    privacy_statement,
    rdp_to_epsilon,
    worst_case_loss,
)
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS
from opacus_pi.accounting.group.worst_case import group_worst_case_loss

DELTA = 1e-5


def mechanism(**changes):
    facts = {"num_steps": 60, "sample_rate": 0.05, "noise_std": 2.0}
    return NoisySGD(**{**facts, "max_grad_norm": 1.0, **changes})


def ledger(seed=0, **changes):
    norms = np.random.default_rng(seed).gamma(1.0, 0.5, (3, 6))
    return GradNormLedger(mechanism(**changes), [20, 40, 60], norms)


def test_one_row_has_its_estimate_beside_the_worst_case():
    run = ledger()
    statement = privacy_statement(run, [4], DELTA)
    losses = [worst_case_loss(run.mechanism, a) for a in DEFAULT_ORDERS]
    converted = rdp_to_epsilon(losses, DEFAULT_ORDERS, DELTA)
    assert statement.converted_worst_case == converted > statement.worst_case
    least = min(epsilons(run, DELTA)[4], statement.worst_case)
    assert 0 < statement.epsilon == least
    assert (statement.subject, statement.num_rows) == ("example 4", 1)


def test_an_example_that_no_update_drew_is_said():
    run = ledger()
    assert "recorded at 3 updates)" in str(privacy_statement(run, [4], DELTA))
    norms = run.grad_norms.copy()
    norms[:, 4] = np.nan
    never = GradNormLedger(mechanism(), [20, 40, 60], norms, source="observed")
    said = "; no update drew this example, so norms of others stand in)"
    assert said in str(privacy_statement(never, [4], DELTA))
    assert said not in str(privacy_statement(never, [3], DELTA))
    once = GradNormLedger(mechanism(), [60], run.grad_norms[:1])
    assert "recorded at 1 update)" in str(privacy_statement(once, [4], DELTA))


def test_several_runs_are_averaged():
    runs = [ledger(seed=s) for s in (0, 1)]
    statement = privacy_statement(runs, [4], DELTA)
    assert statement.epsilon == min(epsilons(runs, DELTA)[4], statement.worst_case)


def test_rows_are_positions_in_the_data_set():
    part = ledger().subset([5, 2])
    expected = epsilons(ledger(), DELTA)[2]
    assert privacy_statement(part, [2], DELTA).epsilon == pytest.approx(expected)
    with pytest.raises(ValueError, match="^rows must .*examples of the ledger"):
        privacy_statement(part, [3], DELTA)


def test_one_example_is_a_list_too():
    with pytest.raises(
        ValueError, match=r"rows must be a flat list, got 4. Write \[4\]."
    ):
        privacy_statement(ledger(), 4, DELTA)


def test_several_examples_have_the_worst_case_of_a_group_only():
    statement = privacy_statement(ledger(), [1, 4, 2], DELTA, subject="Ann")
    assert statement.epsilon is None and statement.num_rows == 3
    single = privacy_statement(ledger(), [1], DELTA).worst_case
    losses = [group_worst_case_loss(mechanism(), 3, a) for a in (2.0, 4.0, 8.0)]
    assert statement.worst_case <= rdp_to_epsilon(losses, [2.0, 4.0, 8.0], DELTA)
    assert statement.worst_case > 1.5 * single
    text = str(statement)
    assert "Ann (3 training examples" in text and "do not add up" in text
    assert "owner" not in statement.sharing and "anyone" in statement.sharing


def test_a_name_cannot_write_lines_of_the_statement():
    name = "Ann\n\x1b[2KEpsilon is 0\u2028for everyone\t."
    statement = privacy_statement(ledger(), [1], DELTA, subject=name)
    plain = str(privacy_statement(ledger(), [1], DELTA, subject="Ann"))
    text = str(statement)
    assert len(text.splitlines()) == len(plain.splitlines())
    assert "for Ann\\n\\x1b[2KEpsilon is 0\\u2028for everyone\\t. (1 tr" in text
    assert json.loads(statement.to_json())["subject"] == name


def test_sharing_says_with_whom_each_number_may_be_shared():
    statement = privacy_statement(ledger(), [1], DELTA)
    assert (
        "with the owner only" in statement.sharing
        and "Theorem 3.2" in statement.sharing
    )
    text = str(statement)
    assert statement.sharing in text
    assert "not a bound" in text
    written = float(text.split("For any data: ε ≤ ")[1].split()[0])
    assert statement.worst_case <= written <= statement.worst_case * 1.001
    for assumption in statement.assumptions:
        assert assumption.statement in text


def observed(num_rows, norm):
    """Norms of forty examples, each drawn in about half of the rows."""
    random = np.random.default_rng(num_rows)
    norms = random.gamma(2.0, 0.5 * norm, (num_rows, 40))
    norms[random.random(norms.shape) < 0.5] = np.nan
    steps = np.arange(1, num_rows + 1) * 10
    return GradNormLedger(
        mechanism(num_steps=int(steps[-1])), steps, norms, source="observed"
    )


def test_an_upper_limit_stands_beside_an_estimate_from_observed_norms():
    statement = privacy_statement(observed(60, 0.1), [1], DELTA)
    assert statement.epsilon < statement.limit < statement.worst_case
    assert "with 95 % confidence, as measured and not proved" in str(statement)
    assert "get_epsilon of an engine" in str(statement)


def test_no_number_exceeds_the_worst_case():
    run = observed(2, 1.0)
    for row in range(run.num_examples):
        statement = privacy_statement(run, [row], DELTA)
        assert statement.epsilon <= statement.worst_case
        assert statement.limit == statement.worst_case
        assert "may be as large as the bound in the next line" in str(statement)


def test_swept_norms_have_no_limit_over_draws():
    statement = privacy_statement(ledger(), [1], DELTA)
    assert statement.limit is None and "95 %" not in str(statement)


@pytest.mark.parametrize(
    "run",
    [ledger(noise_std=0.0), ledger().with_noise_std(2.0)],
    ids=["none", "assumed"],
)
@pytest.mark.parametrize("rows", [[1], [1, 2]])
def test_without_real_noise_there_is_no_number(run, rows):
    statement = privacy_statement(run, rows, DELTA)
    assert statement.epsilon is None and statement.worst_case == math.inf
    assert statement.sharing == ""
    assert not statement.assumptions[0].met
    assert "no bound can be given" in str(statement)


def test_without_clipping_there_is_no_worst_case():
    statement = privacy_statement(ledger(max_grad_norm=math.inf), [1], DELTA)
    assert statement.epsilon > 0 and statement.worst_case == math.inf
    assert (
        "with the owner only" in statement.sharing and "anyone" not in statement.sharing
    )
    unmet = [a.statement for a in statement.assumptions if not a.met]
    assert "every gradient was clipped" in unmet


def test_a_fixed_schedule_says_so():
    statement = privacy_statement(ledger(sampling="fixed"), [1], DELTA)
    assert "no amplification" in str(statement)


def test_json_holds_everything():
    for run in (ledger(), ledger(max_grad_norm=math.inf)):
        statement = privacy_statement(run, [1], DELTA)
        facts = json.loads(statement.to_json())
        assert facts["epsilon"] == statement.epsilon
        assert float(facts["worst_case"]) == statement.worst_case
        assert len(facts["assumptions"]) == len(statement.assumptions)
        assert facts["sharing"] == statement.sharing and facts["delta"] == DELTA


@pytest.mark.parametrize(
    "rows, delta, message",
    [
        ([], DELTA, "rows"),
        ([1, 1], DELTA, "duplicates"),
        ([1], 0.0, "delta must be in .*, got 0"),
    ],
)
def test_bad_input_is_refused(rows, delta, message):
    with pytest.raises(ValueError, match=message):
        privacy_statement(ledger(), rows, delta)


@pytest.mark.parametrize("noise_std", [0.0, 2.0])
def test_only_noise_that_was_drawn_is_said_to_be_unpredictable(noise_std):
    mechanism = NoisySGD(10, 0.1, noise_std, 1.0)
    ledger = GradNormLedger(mechanism, [10], [[0.5, 0.1]])
    said = str(privacy_statement(ledger, [0], 1e-5))
    assert ("the noise cannot be predicted" in said) == (noise_std > 0)
    if noise_std:
        assumed = str(privacy_statement(ledger.with_noise_std(1.0), [0], 1e-5))
        assert "the noise cannot be predicted" not in assumed
