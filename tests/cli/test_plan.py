"""Plans on the command line are the library's."""

import json
from dataclasses import replace

import numpy as np
import pytest

from opacus_pi.ledger.custody import Custody, Link
from opacus_pi.unlearning.plan import make_plan
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, MODEL

PLAN = ("plan", "ledger.safetensors", "--forget")
BUILD = ("--model", "cli_project:build")


def test_numbers_are_the_librarys(answer, ledger):
    found = answer(*PLAN, "3,17", "--order", 4, "--batch-size", 10)
    plan = make_plan([ledger], [3, 17], order=4.0, batch_size=10)
    assert found["num_forget"] == 2 and found["num_retain"] == 118
    assert found["percentile"] == plan.percentile
    assert found["mean_loss"] == plan.mean_loss
    assert found["steps_per_epoch"] == 12
    assert (
        found["predicted_epochs"] is None
        and "needs two past runs" in found["prediction"]
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "17\n3\n"), ("a.json", "[3, 17]"), ("a.ids", "3, 17")],
)
def test_ids_from_a_file(answer, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert answer(*PLAN, tmp_path / name) == answer(*PLAN, "3,17")


def test_ids_from_an_array(answer, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([17, 3]))
    assert answer(*PLAN, tmp_path / "ids.npy") == answer(*PLAN, "3 17")


def test_past_runs_predict(answer, ledger):
    found = answer(*PLAN, "3", "--past", "4=1.5", "--past", "5,6=4")
    past = [([4], 1.5), ([5, 6], 4.0)]
    plan = make_plan([ledger], [3], order=8.0, past_runs=past)
    assert found["predicted_epochs"] == plan.predicted_epochs is not None
    assert found["predicted_steps"] == plan.predicted_steps


def test_past_runs_that_never_got_there(answer, ledger):
    found = answer(*PLAN, "3", "--past", "4=1.5", "--past", "5,6=25+")
    past = [([4], 1.5), ([5, 6], np.inf, 25.0)]
    plan = make_plan([ledger], [3], order=8.0, past_runs=past)
    assert found["predicted_epochs"] == plan.predicted_epochs is not None
    assert found["num_unfinished"] == 1 and "lower bound" in found["prediction"]


@pytest.mark.parametrize(
    "words",
    [
        ("score", "broken.safetensors"),
        ("plan", "broken.safetensors", "--forget", "3"),
        ("plan", "broken.safetensors", "--forget", "3", *BUILD),
        ("unlearn", *MODEL, *DATA, "--forget", "3", "--epochs", 1)
        + ("--ledger", "broken.safetensors", "--out", "never"),
    ],
)
def test_a_file_with_a_broken_link_gives_no_number(run, ledger, project, words):
    link = Link("schedule", "broken", "The ledger holds 4 of 9 updates.")
    replace(ledger, custody=Custody((link,))).save(project / "broken.safetensors")
    code, out, err = run(*words)
    if words[0] == "unlearn":  # runs, and says that it proves nothing
        assert code == 0 and "No finite divergence from retraining is claimed" in out
        assert "not met: each example was drawn" in out and "4 of 9 updates" in out
    else:
        assert code != 0 and "4 of 9 updates" in err
    assert "ε ≤" not in out


def kind(answer, *words):
    return answer(*PLAN, *words)["guarantee"]["kind"]


def test_kind_of_guarantee(answer):
    langevin = (*BUILD, "--method", "langevin", "--set", "noise_std=0.1")
    assert kind(answer, "3", *langevin) == "certified if"
    assert kind(answer, "3", *BUILD) == "certified if"  # fine-tuning, too
    assert kind(answer, "3,4", *langevin) == "certified if"
    assert kind(answer, "3", *BUILD, "--method", "neggrad") == "empirical"
    assert kind(answer, "3") == "empirical"  # no method was named


def test_text_and_file(run, tmp_path):
    code, out, err = run(*PLAN, "3", "--out", tmp_path / "plan.json")
    assert (code, err) == (0, "") and "Examples to forget: 1, to keep: 119" in out
    assert json.loads((tmp_path / "plan.json").read_text())["num_forget"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("120",), "--forget must be in [0, 120), got 120"),
        ((str(10**30),), f"--forget must be in [0, 120), got {10**30}"),
        ((f"3,{2**63}",), f"--forget must be in [0, 120), got {2**63}"),
        (("3,3",), "--forget must not have duplicates, got 3 more than once"),
        (("nobody.txt",), "--forget: no such file: nobody.txt"),
        (("",), "--forget: nothing is listed. List ids as 3,17,25"),
        (("cli_project.py",), "does not hold whole numbers"),
        (("3", "--past", "4"), "--past: 4 is not IDS=EPOCHS"),
        (("3", "--past", "nobody=1"), "--past: no such file: nobody"),
        (("3", "--past", "4=x"), "--past: 4=x is not IDS=EPOCHS"),
        (("3", "--past", "4=inf"), "3,17=25+ if the set was not forgotten after 25"),
        (("3", "--method", "l1"), "Name the architecture too: --model"),
        (("3", *BUILD, "--method", "langevin"), "--set noise_std=VALUE"),
        (
            ("3", *BUILD, "--method", "finetune", "--set", "x=1"),
            "--set: x=1 is not NAME=VALUE",
        ),
        (
            ("3", *BUILD, "--method", "langevin", "--set", "noise_std=-1"),
            "--set: noise_std must be finite and at least 0, got -1",
        ),
        (
            ("3", *BUILD, "--method", "langevin", "--set", "noise_std=[1]"),
            "--set: noise_std=[1] does not fit langevin",
        ),
        (("3", "--batch-size", "0"), "argument --batch-size: '0' is not a whole"),
        (("3", "--order", "1"), "--order must be finite and above 1, got 1.0"),
    ],
)
def test_errors(run, words, message):
    code, out, err = run(*PLAN, *words)
    assert code == 2 and out == ""
    assert err.startswith("opacus-pi plan: ") and message in err
    assert err.count("\n") == 1


LANGEVIN = (*BUILD, "--method", "langevin", "--set", "noise_std=.02")
ON = (*MODEL, *DATA[:2], "--ledger", "ledger.safetensors")


def claims_in(found):
    return {
        a["statement"]: a["met"] and a["established"]
        for a in found["guarantee"]["assumptions"]
    }


def test_pending_requests_are_in_the_run_and_in_its_plan(run, answer, tmp_path):
    """``unlearn --log`` forgets them together, from the trained model."""
    path = tmp_path / "deletions.db"
    DeletionRequests(path, 120).submit("a", indices=[5, 6])
    content = path.read_bytes()
    found = answer(*PLAN, "3", *LANGEVIN, "--log", path)
    assert found["pending"] == ["a"] and found["num_forgotten_before"] == 0
    assert (found["num_forget"], found["num_retain"]) == (3, 117)
    together = answer(*PLAN, "3,5,6", *LANGEVIN)
    for name in ("mean_loss", "epsilon", "percentile"):
        assert found[name] == together[name]
    _, out, _ = run(*PLAN, "3", "--log", path)
    assert out.startswith(f"Pending in {path}: a. 'opacus-pi unlearn --log' carries")
    assert "They add 2 examples to those of the command." in out
    assert path.read_bytes() == content
    run_of_it = answer(
        *("unlearn", *ON, "--forget", "3", "--method", "langevin"),
        *("--set", "noise_std=.02", "--log", path, "--out", tmp_path / "run"),
    )
    assert run_of_it["epsilon"] == found["epsilon"]
    assert claims_in(run_of_it).keys() == claims_in(found).keys()
    assert run_of_it["guarantee"]["kind"] == found["guarantee"]["kind"]


def test_a_request_that_is_named_again_is_counted_once(run, answer, tmp_path):
    path = tmp_path / "deletions.db"
    DeletionRequests(path, 120).submit("a", indices=[3])
    found = answer(*PLAN, "3", *LANGEVIN, "--log", path)
    alone = answer(*PLAN, "3", *LANGEVIN)
    assert found["pending"] == ["a"] and alone["pending"] == []
    assert found["epsilon"] == alone["epsilon"] and found["num_forget"] == 1
    assert (
        "The command names all of their examples" in run(*PLAN, "3", "--log", path)[1]
    )


def test_what_was_carried_out_is_forgotten_before(run, answer, tmp_path):
    path = tmp_path / "deletions.db"
    words = ("unlearn", *ON, "--epochs", "1", "--log", path)
    answer(*words, "--forget", "5,6", "--out", tmp_path / "first")
    found = answer(*PLAN, "3", *BUILD, "--log", path)
    assert found["pending"] == [] and found["num_forget"] == 1
    assert (found["num_retain"], found["num_forgotten_before"]) == (117, 2)
    one = "no earlier run was fine-tuned on the forget set"
    assert claims_in(found)[one] is False
    out = run(*PLAN, "3", "--log", path)[1]
    assert out.startswith(f"Pending in {path}: no request.\n")
    assert "covers 3 examples: 1 new, and 2 forgotten before" in out
    again = answer(*words, "--forget", "3", "--out", tmp_path / "second")
    assert again["guarantee"]["kind"] == found["guarantee"]["kind"] == "empirical"
    path.with_name("deletions.db.safetensors").unlink()
    code, _, err = run(*PLAN, "3", "--log", path)
    assert code == 2 and "has the weights that honour the 2 requests" in err


def test_a_bad_record(run, tmp_path):
    code, _, err = run(*PLAN, "3", "--log", tmp_path / "nothing")
    assert code == 2 and "--log: no such file" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = run(*PLAN, "3", "--log", "model.safetensors")
    assert (
        code == 2 and "--log: path must be a deletion log, got model.safetensors" in err
    )
    DeletionRequests(tmp_path / "other", 500).submit("a", indices=[400])
    code, _, err = run(*PLAN, "3", "--log", tmp_path / "other")
    assert code == 2 and "The log belongs to another training set" in err


def test_the_log_of_another_data_set_of_the_same_length_is_refused(
    run, ledger, tmp_path
):
    path = tmp_path / "deletions.db"
    other = "TensorDataset:120:0123456789abcdef:x0123456789abcdef"
    DeletionRequests(path, 120, data_set=other).submit("a", indices=[5, 6])
    code, _, err = run(*PLAN, "3", "--log", path)
    assert code == 2 and f"data_set must be {other}, the one in entry 0" in err


@pytest.mark.parametrize("value", [".02", "+0.02", "2e-2", "0.02"])
def test_a_number_may_be_written_as_people_do(answer, value):
    words = (*BUILD, "--method", "langevin", "--set", f"noise_std={value}")
    assert "noise_std=0.02" in answer(*PLAN, "3", *words)["guarantee"]["method"]
