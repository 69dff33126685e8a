"""A ledger of other weights is refused before anything is entered or trained."""

import os
from argparse import Namespace
from dataclasses import replace

import pytest
from torch.nn import CrossEntropyLoss

from opacus_pi import FineTune, Unlearner
from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.recorded_weights import require_ledgers_of, require_weights_of_log
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.models.weights_name import weights_name
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
    way_on = "write --without-ledger in place of --ledger"
    for log, advice in (((), "leave out --ledger"), (("--log", "log.db"), way_on)):
        err = stopped(run, (*words, *log))
        assert "ledger.safetensors names" in err and "--weights retrained.pt" in err
        assert advice in err and "the ledger of the training" in err
    assert not os.path.exists("log.db")
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
    words = ("unlearn", *OTHER, *SHORT, *log, "--forget", "7", "--out", tmp_path / "c")
    code, _, err = run(*words, *LEDGER)
    assert code == 2 and "has neither the weights from which" in err
    without = ("unlearn", *honouring, *SHORT, *LEDGER, "--forget", "7")
    err = stopped(run, (*without[1:], "--out", tmp_path / "d"))
    assert "weights.safetensors" in err  # these are weights after later training
    assert verify(tmp_path / "log.db").head == head
    words = ("unlearn", *MODEL, *SHORT, *LEDGER, *log, "--forget", "7")
    text = run(*words, "--out", tmp_path / "7")[1]
    assert "The run started from the weights beside the log" in text
    assert "also left out the 3 other examples of earlier requests" in text


def test_a_log_that_began_with_other_weights(run, answer, tmp_path):
    log = ("--log", tmp_path / "log.db")
    words = ("unlearn", *OTHER, *SHORT, *log, "--forget")
    bare = ("--without-ledger", "--out")
    answer(*words, "3", *bare, tmp_path / "a")
    err = stopped(run, (*words[1:], "5", *LEDGER, "--out", tmp_path / "b"))
    assert "the weights from which the requests in" in err and "log.db started" in err
    answer(*words, "5", *bare, tmp_path / "b")


@pytest.mark.parametrize("requests", [("--forget", "3"), ("--pending",)])
def test_a_forgotten_ledger_costs_no_request(run, answer, tmp_path, requests):
    log = tmp_path / "log.db"
    DeletionRequests(log, 120).submit("waiting", indices=[5])
    before = log.read_bytes()
    words = (*MODEL, *SHORT, *requests, "--log", log, "--out", tmp_path / "run")
    err = stopped(run, words)
    assert "Nothing was entered. Add --ledger LEDGER" in err
    assert "add --without-ledger" in err and log.read_bytes() == before
    found = answer("unlearn", *words, "--without-ledger")
    assert found["guarantee"]["kind"] == "empirical" and found["carried_out"]


def test_after_rewinds_the_ledger_names_the_trained_weights(project, ledger):
    import cli_project

    beside = cli_project.build()  # the weights beside the log
    options = Namespace(weights="w.pt", log="log.db")
    for runs, given, fits in (
        (ledger, ledger.weights, True),
        (ledger, weights_name(beside), True),
        (ledger, f"sha256:{'0' * 64}", False),
        (replace(ledger, weights=None), f"sha256:{'0' * 64}", True),
        (None, f"sha256:{'0' * 64}", True),
    ):
        worker = Unlearner(
            beside, criterion=CrossEntropyLoss(), method=FineTune(), ledger=runs
        )
        if fits:
            require_weights_of_log(options, given, worker)
            continue
        with pytest.raises(BadInput, match="--weights: w.pt holds neither .*log.db"):
            require_weights_of_log(options, given, worker)


def test_a_data_set_that_lacks_erased_files_needs_the_log(ledger):
    for log, remedy in ((None, True), ("log.db", False)):
        options = Namespace(ledger=["ledger.safetensors"], log=log, flags={})
        with pytest.raises(BadInput, match="--ledger ledger.safetensors") as raised:
            require_ledgers_of(options, [ledger], "ImageFolder:119:abc:def")
        assert ("add --log" in str(raised.value)) == remedy
