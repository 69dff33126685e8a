"""A ledger of other weights is refused before anything is entered or trained."""

from dataclasses import replace

import pytest

from opacus_pi import Unlearner
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.unlearning.deletion_log import verify
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, MODEL

LEDGER = ("--ledger", "ledger.safetensors")
OTHER = ("--model", "cli_project:build", "--weights", "retrained.pt")
SHORT = (*DATA[:2], "--epochs", "1")


def stopped(run, words):
    """Run a command that must stop at its ledger; the message."""
    code, out, err = run("unlearn", *words)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("opacus-pi unlearn: --ledger: ")
    return err


def test_nothing_is_entered_and_both_files_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Unlearner, "unlearn", None)  # nothing is trained
    words = (*OTHER, *SHORT, *LEDGER, "--forget", "3", "--out", tmp_path / "run")
    for log in ((), ("--log", tmp_path / "log.db")):
        err = stopped(run, (*words, *log))
        assert "ledger.safetensors names" in err and "--weights retrained.pt" in err
        assert "leave out --ledger" in err and "the ledger of the training" in err
    assert [*tmp_path.iterdir()] == []


def test_without_the_ledger_the_run_is_possible(run, tmp_path):
    words = (*OTHER, *SHORT, "--forget", "3", "--out", tmp_path / "run")
    code, out, err = run("unlearn", *words)
    assert (code, err) == (0, "") and "Empirical" in out


def test_an_existing_log_gets_no_request(run, tmp_path):
    log = tmp_path / "log.db"
    DeletionRequests(log, 120).submit("waiting", indices=[5])
    before = log.read_bytes()
    words = (*OTHER, *SHORT, *LEDGER, "--log", log, "--forget", "3")
    stopped(run, (*words, "--out", tmp_path / "run"))
    assert log.read_bytes() == before
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "log.db.safetensors").exists()


@pytest.mark.parametrize("weights", [None, CHANGED])
def test_a_ledger_that_does_not_name_the_weights_is_taken(
    run, ledger, tmp_path, weights
):
    replace(ledger, weights=weights).save(tmp_path / "l.safetensors")
    words = (*OTHER, *SHORT, "--ledger", tmp_path / "l.safetensors", "--forget", "3")
    assert run("unlearn", *words, "--out", tmp_path / "run")[0] == 0


def test_one_of_several_runs_has_left_the_weights(run, answer, ledger, tmp_path):
    other = f"sha256:{'0' * 64}"
    for number, name in enumerate(("second", "third"), start=2):
        run_again = replace(ledger, grad_norms=ledger.grad_norms / number)
        named = replace(run_again, weights=f"{other[:-1]}{number}")
        named.save(tmp_path / f"{name}.safetensors")
    words = (*SHORT, "--forget", "3", "--out", tmp_path / "run", "--ledger")
    files = (tmp_path / "second.safetensors", tmp_path / "third.safetensors")
    err = stopped(run, (*MODEL, *words, *files))
    assert "second.safetensors, " in err and "third.safetensors name by" in err
    found = answer("unlearn", *MODEL, *words, files[0], LEDGER[1])
    assert found["guarantee"]["kind"] == "certified if"


def test_later_requests_continue_from_weights_that_the_log_knows(run, answer, tmp_path):
    log = ("--log", tmp_path / "log.db")
    answer(
        *("unlearn", *MODEL, *SHORT, *LEDGER, *log, "--forget", "3"),
        *("--out", tmp_path / "a"),
    )
    honouring = (*MODEL[:3], tmp_path / "5" / "weights.safetensors")
    for name, model in (("5", MODEL), ("6", honouring)):
        words = ("unlearn", *model, *SHORT, *LEDGER, *log, "--forget", name)
        answer(*words, "--out", tmp_path / name)
    head = verify(tmp_path / "log.db").head
    without = ("unlearn", *honouring, *SHORT, *LEDGER, "--forget", "7")
    err = stopped(run, (*without[1:], "--out", tmp_path / "d"))
    assert "weights.safetensors" in err  # these are weights after later training
    assert verify(tmp_path / "log.db").head == head


def test_a_log_that_began_with_other_weights(run, answer, tmp_path):
    log = ("--log", tmp_path / "log.db")
    words = ("unlearn", *OTHER, *SHORT, *log, "--forget")
    answer(*words, "3", "--out", tmp_path / "a")
    err = stopped(run, (*words[1:], "5", *LEDGER, "--out", tmp_path / "b"))
    assert "the weights from which the requests in" in err and "log.db started" in err
    answer(*words, "5", "--out", tmp_path / "b")
