"""From the run's directory to the page."""

import dataclasses
import hashlib
import json
import shutil

import pytest

from tests.cli.conftest import DATA, LOG, MODEL

LEDGER = ("--ledger", "ledger.safetensors")
FORGET = ("--forget", "3,17")


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """A run with its evaluation, made once."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def done(finished, run):
    if not finished.exists():
        words = ("unlearn", *MODEL, *DATA, *FORGET, "--epochs", "1", "--out", finished)
        assert run(*words)[0] == 0
        weights = ("--weights", finished / "weights.safetensors")
        words = ("evaluate", "--model", "cli_project:build", *weights, *DATA, *FORGET)
        out = ("--oracle", "retrained.pt", "--out", finished / "evaluation.json")
        assert run(*words, *out)[0] == 0
    return finished


def test_a_whole_run(run, done, tmp_path):
    page = tmp_path / "report.html"
    code, out, err = run("report", done, *LEDGER, "--out", page)
    assert (code, err) == (0, "") and f"Wrote {page}" in out and "Sensitive" in out
    facts = json.loads((tmp_path / "report.json").read_text())
    oracle = json.loads((done / "evaluation.json").read_text())["oracle"]
    assert facts["unlearning"]["oracle"] == oracle
    assert facts["unlearning"]["barriers"]["matched"] is False
    assert facts["unlearning"]["forget_set"]["size"] == 2
    words = page.read_text()
    assert "Loss barriers" in words and "Before and after" in words


def test_training_alone(answer, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("an older report, which is overwritten")
    found = answer("report", *LEDGER, "--top", 2, "--title", "A & B", "--out", page)
    assert found["written"] == [str(page), str(tmp_path / "report.json")]
    assert len(found["report"]["hardest"]) == 2 and "unlearning" not in found["report"]
    assert "<h1>A &amp; B</h1>" in page.read_text()


def damaged(done, tmp_path, name, content):
    copied = tmp_path / "copied"
    shutil.copytree(done, copied)
    (copied / name).write_text(content)
    return copied


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", "{}", "evaluation.json is damaged"),
        ("evaluation.json", "[]", "is not a JSON object"),
        (
            "evaluation.json",
            '{"format": "opacus_pi.cli.evaluate.v1", "barriers": [1], "oracle": {}}',
            "evaluation.json is damaged",
        ),
        (
            "evaluation.json",
            '{"format": "opacus_pi.cli.evaluate.v1", "barriers": 0, "oracle": {"a": 1}'
            "}",
            "evaluation.json is damaged",
        ),
        (
            "record.json",
            '{"forget_indices": ["<b>"]}',
            "has no list of whole numbers named forget_indices",
        ),
        (
            "record.json",
            '{"forget_indices": [1e30]}'.replace("1e30", "9" * 30),
            "has no list of whole numbers named forget_indices",
        ),
        ("record.json", "{", "is not a JSON object"),
        ("guarantee.json", "{}", "must be JSON in the format opacus_pi.Guarantee"),
        ("trace.json", "{}", "must contain opacus_pi.UnlearningTrace"),
    ],
)
def test_damaged_runs(run, done, tmp_path, name, content, message):
    copied = damaged(done, tmp_path, name, content)
    code, out, err = run("report", copied, *LEDGER, "--out", tmp_path / "r.html")
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing", *LEDGER, "--out", "r.html"), "RUN_DIR nothing: no such file"),
        ((*LEDGER, "--out", "r.json"), "--out: r.json does not end in .html"),
        ((*LEDGER, "--out", "no/r.html"), "--out: no/r.html cannot be written"),
        (("--ledger", "model.safetensors", "--out", "r.html"), "--ledger model.safe"),
        ((*LEDGER, "--evaluation", "x.json", "--out", "r.html"), "Name RUN_DIR"),
        (("--out", "r.html"), "required: --ledger"),
    ],
)
def test_errors(run, words, message):
    code, out, err = run("report", *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


WEIGHTS_OF_A_RUN = ("trained_weights", "unlearned_weights")
ABC = "sha256:" + "abc1" * 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"weights": ABC},
            "--ledger must be of the training from which the unlearning",
        ),
        ({"data_set": "Other:120"}, "--ledger must be of the data set of the unlearn"),
    ],
)
def test_the_ledger_of_another_training(run, done, ledger, tmp_path, changed, message):
    dataclasses.replace(ledger, **changed).save(tmp_path / "other.safetensors")
    words = ("--ledger", tmp_path / "other.safetensors", "--out", tmp_path / "r.html")
    code, out, err = run("report", done, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("weights", "forget", "message"),
    [
        ("model.safetensors", "3,17", "is of another model than the unlearning run"),
        (None, "40,41", "is of another forget set than the unlearning run"),
        ("model.safetensors", "3", "of another forget set and another model than"),
    ],
)
def test_the_evaluation_of_another_run(run, done, tmp_path, weights, forget, message):
    other = ("--weights", weights or done / "weights.safetensors", "--forget", forget)
    found = ("--out", tmp_path / "ev.json")
    model = ("--model", "cli_project:build")
    assert run("evaluate", *model, *other, *DATA, *found)[0] == 0
    words = ("--evaluation", tmp_path / "ev.json", "--out", tmp_path / "r.html")
    code, out, err = run("report", done, *LEDGER, *words)
    assert code == 2 and out == "" and message in err
    assert not (tmp_path / "r.html").exists()


def test_retrained_models_of_all_requests_beside_one_request(
    run, answer, project, tmp_path
):
    for name, forget in (("a", "3,17"), ("b", "5,6,7")):
        words = ("unlearn", *MODEL, *DATA, "--forget", forget, "--epochs", "1")
        log = (*LOG, tmp_path / "deletions.db", "--request-id", name)
        assert run(*words, *log, "--out", tmp_path / name)[0] == 0
    weights = ("--weights", tmp_path / "b" / "weights.safetensors")
    words = ("evaluate", "--model", "cli_project:build", *weights, *DATA)
    out = ("--oracle", "retrained.pt", "--out", tmp_path / "b" / "evaluation.json")
    assert run(*words, "--forget", "3,5,6,7,17", *out)[0] == 0
    page = tmp_path / "r.html"
    found = answer("report", tmp_path / "b", *LEDGER, "--out", page)
    unlearning = found["report"]["unlearning"]
    beside = {m["name"] for m in unlearning["metrics"] if "oracle_mean" in m}
    assert beside == {"retain_accuracy", "test_accuracy", "attacker_accuracy"}
    (sentence,) = unlearning["not_checked"]
    assert "a forget set of 5 examples" in sentence and "on the 3 examples" in sentence
    assert sentence in page.read_text()
    facts = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    for without in ("subject", "num_forget"):  # a file of an earlier release
        facts.pop("checksum", None)
        del facts[without]
        (tmp_path / "old.json").write_text(json.dumps(facts))
        old = ("--evaluation", tmp_path / "old.json", "--out", page)
        found = answer("report", tmp_path / "b", *LEDGER, *old)["report"]["unlearning"]
        shown = any("forget set of 5" in one for one in found["not_checked"])
        assert shown == (without == "subject")


@pytest.mark.parametrize(
    "name",
    [
        "trace.json",
        "guarantee.json",
        "weights.safetensors",
        "guarantee_to_show.json",
    ],
)
def test_files_of_two_runs_in_one_directory(run, done, tmp_path, name):
    words = ("unlearn", *MODEL, *DATA, "--forget", "5", "--epochs", "2")
    assert run(*words, *LEDGER, "--out", tmp_path / "other")[0] == 0
    copied = damaged(done, tmp_path, "trace.json", (done / "trace.json").read_text())
    shutil.copy(tmp_path / "other" / name, copied / name)
    code, out, err = run("report", copied, *LEDGER, "--out", tmp_path / "r.html")
    assert code == 2 and f"{name} is not the file that record.json names" in err


def test_a_record_that_was_edited(run, done, tmp_path):
    words = ("unlearn", *MODEL, *DATA, "--forget", "5", "--epochs", "2")
    assert run(*words, *LEDGER, "--out", tmp_path / "other")[0] == 0
    other = (tmp_path / "other" / "guarantee.json").read_bytes()
    record = json.loads((done / "record.json").read_text())
    record["files"]["guarantee.json"] = hashlib.sha256(other).hexdigest()
    copied = damaged(done, tmp_path, "guarantee.json", other.decode())
    (copied / "record.json").write_text(json.dumps(record))
    code, out, err = run("report", copied, *LEDGER, "--out", tmp_path / "r.html")
    assert code == 2 and "record.json does not match its checksum" in err
    assert run("verify", copied / "record.json")[0] == 1
    assert run("verify", done / "record.json")[0] == 0


def test_an_evaluation_that_was_edited(run, done, tmp_path):
    facts = json.loads((done / "evaluation.json").read_text())
    facts["oracle"]["forget_accuracy"] = [0.123]
    copied = damaged(done, tmp_path, "evaluation.json", json.dumps(facts))
    code, out, err = run("report", copied, *LEDGER, "--out", tmp_path / "r.html")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "evaluation.json does not match its checksum. It was edited" in err
    assert not (tmp_path / "r.html").exists()
    assert run("verify", copied / "evaluation.json")[0] == 1
    assert run("verify", done / "evaluation.json")[0] == 0
    del facts["checksum"]
    (copied / "evaluation.json").write_text(json.dumps(facts))
    assert run("verify", copied / "evaluation.json")[0] == 3
    assert run("report", copied, *LEDGER, "--out", tmp_path / "r.html")[0] == 0
    assert "evaluation.json was edited is not known" in (
        (tmp_path / "r.html").read_text()
    )


def test_a_run_without_the_guarantee_to_show(run, done, tmp_path):
    copied = damaged(done, tmp_path, "trace.json", (done / "trace.json").read_text())
    (copied / "guarantee_to_show.json").unlink()
    assert run("report", copied, *LEDGER, "--out", tmp_path / "r.html")[0] == 0


def test_the_report_says_what_older_files_leave_open(answer, done, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(done, copied)
    for name, added in (
        (
            "record.json",
            ("checksum", "files", "ledgers", "trained_weights", "unlearned_weights"),
        ),
        ("evaluation.json", ("checksum", "subject")),
    ):
        facts = json.loads((copied / name).read_text())
        for entry in added:
            del facts[entry]
        (copied / name).write_text(json.dumps(facts))
    page = tmp_path / "r.html"
    found = answer("report", copied, *LEDGER, "--out", page)
    sentences = found["report"]["unlearning"]["not_checked"]
    assert [one.split(" is not known")[0] for one in sentences] == [
        "Whether trace.json, guarantee.json and record.json are of the same run",
        f"Whether {copied / 'evaluation.json'} was edited",
        "Whether the evaluation is of this unlearning run",
        "Whether the unlearning run started from the training of this ledger",
    ]
    assert all(one in page.read_text() for one in sentences)
    found = answer("report", done, *LEDGER, "--out", page)
    assert found["report"]["unlearning"]["not_checked"] == []


def test_a_run_whose_weights_are_kept_elsewhere(run, done, tmp_path):
    copied = damaged(done, tmp_path, "trace.json", (done / "trace.json").read_text())
    (copied / "weights.safetensors").unlink()
    assert run("report", copied, *LEDGER, "--out", tmp_path / "r.html")[0] == 0
