"""A statement says which requests, when, which weights and what holds, and no more."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from opacus_pi.accounting.guarantee import (
    Assumption,
    EpsilonDelta,
    guarantee_of_run,
    observed,
)
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.files.checksummed_json import with_json_checksum
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import write_weights
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning import (
    DeletionStatement,
    UnlearningResult,
    deletion_statement,
    load_result,
    save_result,
)
from opacus_pi.unlearning.saved_result import SavedResult

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


def result_that_names_its_weights():
    found = result()
    named = {"unlearned_weights": weights_name(found.model)}
    return replace(found, record=found.record | named)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.two = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_file_with_the_weights_of_the_result_is_named(tmp_path, is_saved):
    done = result_that_names_its_weights()
    state = done.model.state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    write_weights(tmp_path / "ours.safetensors", UNLEARNED_WEIGHTS, state, {})
    torch.save(state, tmp_path / "state.pt")
    torch.save({"module_state_dict": state}, tmp_path / "checkpoint")
    save_file({f"_module.{n}": t for n, t in state.items()}, tmp_path / "wrapped")
    save_result(tmp_path / "run", done)
    about = load_result(tmp_path / "run") if is_saved else done
    names = ("plain.safetensors", "ours.safetensors", "state.pt", "checkpoint")
    for name in (*names, "wrapped", "run/weights.safetensors"):
        path = tmp_path / name
        found = deletion_statement(about, 1e-5, weights_path=path)
        assert found.weights_file == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tied_weights_may_be_stored_once(tmp_path):
    done = replace(result(record={}), model=Tied())
    one = {n: t for n, t in done.model.state_dict().items() if n.startswith("one")}
    save_file(one, tmp_path / "weights")
    found = deletion_statement(done, 1e-5, weights_path=tmp_path / "weights")
    assert found.weights_file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other.safetensors", "does not hold the weights that the run left: those of"),
        ("other.pt", "does not hold the weights that the run left"),
        ("half.pt", "does not hold the weights that the run left"),
        ("visits.csv", "must be a file of weights, got .*visits.csv, which cannot be"),
        ("empty", "must be a file of weights"),
        ("much.pt", "must be a file of weights"),
        ("log.db.safetensors", "lists the forgotten examples, so it must not be given"),
    ],
)
def test_a_file_without_the_weights_of_the_result_is_refused(tmp_path, name, message):
    done = result_that_names_its_weights()
    state = done.model.state_dict()
    other = torch.nn.Linear(1, 1).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    torch.save(other, tmp_path / "other.pt")
    torch.save({n: t.half() for n, t in state.items()}, tmp_path / "half.pt")
    (tmp_path / "visits.csv").write_text("patient,age\nP0001,34\n")
    (tmp_path / "empty").touch()
    torch.save({"epoch": 3, **state}, tmp_path / "much.pt")
    path, facts = tmp_path / "log.db.safetensors", {"forgotten": "[3]"}
    write_weights(path, UNLEARNED_WEIGHTS, state, facts)
    with pytest.raises(ValueError, match=message):
        deletion_statement(done, 1e-5, weights_path=tmp_path / name)


def test_a_result_whose_weights_are_not_known_names_no_file(tmp_path):
    save_file(torch.nn.Linear(1, 1).state_dict(), tmp_path / "weights")
    early = SavedResult(result().trace, result().guarantee, {"forget_indices": [3]})
    assert deletion_statement(early, 1e-5).weights_file == ""
    with pytest.raises(ValueError, match="cannot be compared .* earlier release"):
        deletion_statement(early, 1e-5, weights_path=tmp_path / "weights")


def test_a_model_that_was_changed_after_the_run_is_not_saved(tmp_path):
    done = result_that_names_its_weights()
    done.model.bias.data.add_(1)
    with pytest.raises(ValueError, match="result must have the model as the run left"):
        save_result(tmp_path / "run", done)
    assert not (tmp_path / "run").exists()


def test_it_names_the_requests_the_date_and_the_weights(tmp_path):
    path, done = tmp_path / "weights.safetensors", result_that_names_its_weights()
    save_file(done.model.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = deletion_statement(done, 1e-5, weights_path=path)
    facts = json.loads(found.to_json())
    assert facts.keys() == KEYS
    claim = found.guarantee
    expected = {
        "requests": ["2026-001", "2026-002"],
        "finished": RECORD["finished"],
        "num_forgotten": 3,
        "num_requested": 2,
        "weights": weights_name(done.model),
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
    match = "edited|got something else" if with_checksum else "It was edited or damaged"
    with pytest.raises(ValueError, match=match):
        DeletionStatement.from_json(json.dumps(facts))


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"format": 1}'])
def test_other_texts_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="text must be JSON in the format"):
        DeletionStatement.from_json(text)
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="text must be JSON in the format"):
        DeletionStatement.load(tmp_path / "other.json")


def test_the_statement_for_one_request_names_no_other():
    whole = replace(
        deletion_statement(result(), 1e-5),
        requests=("2026-001", "2026-002"),
        num_forgotten=6,
        num_requested=6,
    )
    own = DeletionStatement.from_json(whole.for_request("2026-002").to_json())
    assert own.requests == ("2026-002",) and own.guarantee == whole.guarantee
    assert own.num_forgotten == 6 and "2026-001" not in str(own) + own.to_json()
    assert "together ask" in str(whole) and "together ask" not in str(own)
    with pytest.raises(ValueError, match="name must be one of .*got '?2026-003"):
        whole.for_request("2026-003")
