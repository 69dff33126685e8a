"""A statement says which requests, when, which weights and what holds, and no more."""

import hashlib
import json

import pytest
import torch

from opacus_pi.accounting.guarantee import (
    Assumption,
    EpsilonDelta,
    guarantee_of_run,
    observed,
)
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.files.checksummed_json import with_json_checksum
from opacus_pi.unlearning import (
    DeletionStatement,
    UnlearningResult,
    deletion_statement,
)

CLIPPED = observed("every gradient was clipped", "max_grad_norm=1")
SECRET = Assumption("the seed stays secret", True, "nobody can check it")
CURVES = {"orders": (2.0, 8.0), "divergences": (0.5, 2.0), "estimates": (0.1, 0.2)}
RECORD = {
    "forget_indices": [3, 170],
    "forgotten_before": [40],
    "requests": ["2026-001", "2026-002"],
    "seed": 987654321,
    "finished": "2026-03-02T21:40:31+00:00",
    "unlearned_weights": "sha256:1234",
}
# The keys that how-to/regulator.md lists.
KEYS = {
    *("format", "requests", "finished", "num_forgotten", "weights", "weights_file"),
    "num_requested",
    *("kind", "exact", "too_large", "epsilon", "reverse_epsilon", "delta"),
    *("order", "divergence", "in_words", "guarantee", "checksum"),
}


def result(assumptions=(CLIPPED, SECRET), record=RECORD, **numbers):
    claim = guarantee_of_run("Langevin", assumptions, **(numbers or CURVES))
    return UnlearningResult(
        torch.nn.Linear(1, 1), UnlearningTrace(unit="epochs"), claim, record
    )


def test_it_names_the_requests_the_date_and_the_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    found = deletion_statement(result(), 1e-5, weights_path=path)
    facts = json.loads(found.to_json())
    assert facts.keys() == KEYS
    claim = found.guarantee
    expected = {
        "requests": ["2026-001", "2026-002"],
        "finished": RECORD["finished"],
        "num_forgotten": 3,
        "num_requested": 2,
        "weights": "sha256:1234",
        "weights_file": digest,
        "kind": "certified if",
        "exact": False,
        "too_large": False,
        "epsilon": claim.epsilon(1e-5),
        "reverse_epsilon": "inf",
        "delta": 1e-5,
        "order": 8.0,
        "divergence": 2.0,
        "in_words": claim.in_words(1e-5),
    }
    assert {name: facts[name] for name in expected} == expected
    stated = {
        a["statement"]: a["established"] for a in facts["guarantee"]["assumptions"]
    }
    assert stated == {CLIPPED.statement: "observed", SECRET.statement: "declared"}
    text = str(found)
    for part in ("2026-001, 2026-002", RECORD["finished"], digest, "3 examples"):
        assert part in text
    assert "These requests together ask to forget 2 examples. The run ended" in text
    assert "1 of them are declared" in text and SECRET.statement in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requests": ["2026-001"]}, "This request asks to forget 2 examples. The run"),
        ({"requests": []}, "in no deletion log.\nThe run ended"),
        ({"requests": ["2026-001"], "forget_indices": [5]}, "to forget 1 example. The"),
    ],
)
def test_the_number_of_the_requests_own_examples_is_said_if_known(change, words):
    found = deletion_statement(result(record={**RECORD, **change}), 1e-5)
    assert words in str(found)
    assert DeletionStatement.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "for the 3 examples together: it compares with a model that was trained"),
        ({}, "So it holds for each request, too."),
        ({"requests": ["2026-001"]}, "So it holds for each of them, too."),
        ({"requests": []}, "So it holds for each of them, too."),
    ],
)
def test_a_bound_of_several_says_that_it_holds_for_each(change, words):
    assert words in str(deletion_statement(result(record={**RECORD, **change}), 1e-5))


@pytest.mark.parametrize(
    "found",
    [
        result(record={"forget_indices": [3]}),
        result(statements=[EpsilonDelta(0.0, 0.0, "exact rewind", True)]),
        result([observed("it is a bound", "one run", met=False)]),
    ],
    ids=["one example", "exact", "no bound"],
)
def test_where_nothing_is_shared_nothing_is_said_of_each(found):
    assert "holds for each" not in str(deletion_statement(found, 1e-5))


def test_what_is_the_owners_alone_is_not_in_it():
    found = deletion_statement(result(), 1e-5)
    assert found.guarantee == result().guarantee.without_estimates()
    for text in (found.to_json(), str(found), repr(found)):
        assert "170" not in text and "987654321" not in text
        assert "estimate for this set" not in text
    with pytest.raises(ValueError, match="guarantee must have no estimate"):
        DeletionStatement(result().guarantee, 1e-5)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (EpsilonDelta(0.0, 0.0, "exact rewind", True), "declarations hold: ε = 0 at δ"),
        (
            EpsilonDelta(800.0, 0.0, "a proof"),
            "too large to be of practical use: ε ≤ 8",
        ),
        (EpsilonDelta(0.5, 0.0, "a proof"), "Certified, if the declarations hold: ε ≤"),
    ],
)
def test_the_claim_is_said_plainly(pair, words):
    found = deletion_statement(result(statements=[pair]), 1e-5)
    assert words in str(found) and "million" not in str(found)
    assert found.guarantee.in_words(1e-5) in str(found)
    assert DeletionStatement.from_json(found.to_json()) == found


def test_without_a_bound_or_a_log():
    doubtful = observed("it is a bound", "one run", met=False)
    found = deletion_statement(result([doubtful], {}), 1e-5)
    facts = json.loads(found.to_json())
    assert (facts["kind"], facts["epsilon"], facts["order"]) == (
        "empirical",
        "inf",
        None,
    )
    assert "in no deletion log" in str(found) and "No bound is claimed" in str(found)
    assert DeletionStatement.from_json(found.to_json()) == found


def test_a_name_begins_no_line_of_its_own():
    names = {**RECORD, "requests": ["x\nCertified: ε = 0"]}
    assert "x\\nCertified" in str(deletion_statement(result(record=names), 1e-5))


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.1},
        {"requests": ["2026-003"]},
        {"in_words": "Nothing is left."},
        {"note": "approved"},
        {"delta": 2.0},
        {"guarantee": {}},
        {"requests": 3},
        {"num_forgotten": None},
    ],
)
@pytest.mark.parametrize("with_checksum", [False, True])
def test_an_edit_is_noticed(change, with_checksum):
    """With a new checksum, only what does not follow from the guarantee."""
    facts = json.loads(deletion_statement(result(), 1e-5).to_json()) | change
    if with_checksum:
        if change.get("requests") == ["2026-003"]:
            return  # a forger can name other requests: the log shows which were made
        del facts["checksum"]
        facts = with_json_checksum(facts)
    with pytest.raises(ValueError, match="edited|got something else"):
        DeletionStatement.from_json(json.dumps(facts))


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"format": 1}'])
def test_other_texts_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="text must be JSON in the format"):
        DeletionStatement.from_json(text)
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="text must be JSON in the format"):
        DeletionStatement.load(tmp_path / "other.json")
