"""The deletion log from the command line is the library's, and no key is printed."""

import hashlib
import json
import stat

import pytest

from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import write_weights
from opacus_pi.unlearning import exported_entries, list_requests
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from opacus_pi.unlearning.history import History
from opacus_pi.unlearning.honouring_weights import sha256_of
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, LOG, MODEL, owners_file

HONOURED = {
    "honoured_entries": "[]",
    "forgotten": "[3]",
    "forgotten_exactly": "[]",
    "history": History().text,
}
OWNERS = {"p03": [17, 3], "p04": [5], "twin": [5]}
TRAIN = DATA[:2]
UNLEARN = ("unlearn", *MODEL, *TRAIN, "--epochs", "1")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "deletions.db"


@pytest.fixture
def owners(project, tmp_path):
    return owners_file(tmp_path / "owners.json", OWNERS)


def names_of(rows):
    return [row.request_id for row in rows]


# ------------------------------------------------------------------ submit


def test_a_request_is_entered_and_not_carried_out(answer, log, tmp_path):
    import cli_project

    from opacus_pi.ledger import fingerprint

    found = answer("log", "submit", log, *TRAIN, "--forget", "17,3")
    (row,) = found["submitted"]
    assert row["indices"] == [3, 17] and row["state"] == "pending"
    assert found["head"] == verify(log).head and not row["entered_before"]
    (request,) = DeletionRequests(log, 120).pending
    assert request.request_id == row["request_id"]
    about, entry = DeletionLog(log).entries()
    name = fingerprint(cli_project.train_set())
    assert about.payload == {"data_set": name, "num_examples": 120}
    assert entry.payload == {"indices": [3, 17], "num_examples": 120}
    again = answer("log", "submit", log, "--forget", "3,17")
    assert again["submitted"][0]["entered_before"] and again["head"] == found["head"]
    assert {path.name for path in tmp_path.iterdir()} == {"deletions.db"}


def test_a_default_name_cannot_be_guessed_from_the_examples(answer, log, tmp_path):
    """Names were hashes of the examples: whoever guessed them could try it."""
    names = []
    for place in (log, tmp_path / "other.db"):
        found = answer("log", "submit", place, *TRAIN, "--forget", "3,17")
        names.append(found["submitted"][0]["request_id"])
    assert len({*names}) == 2 and all(name.startswith("ids-") for name in names)


def test_an_unnamed_request_of_an_earlier_release_is_found_again(answer, log):
    old = "ids-" + hashlib.sha256(b"[3, 17]").hexdigest()[:16]
    requests = DeletionRequests(log, 120)
    requests.submit("mine", indices=[3, 17])  # a name of the user's is not taken
    requests.submit(old, indices=[3, 17])
    (row,) = answer("log", "submit", log, "--forget", "17,3")["submitted"]
    assert row["request_id"] == old and row["entered_before"]


def test_unlearn_carries_out_the_request_that_was_submitted(run, answer, log, tmp_path):
    for example, name in (("3", ()), ("5", ("--request-id", "2026-002"))):
        words = ("--forget", example, *name)
        (row,) = answer("log", "submit", log, *TRAIN, *words)["submitted"]
        found = answer(*UNLEARN, *LOG, log, *words, "--out", tmp_path / example)
        assert found["request_id"] == row["request_id"] and found["carried_out"]
    rows = list_requests(log)
    assert [row.state for row in rows] == ["carried out"] * 2
    shown = run("log", "list", log, "--request-id", "2026-002")[1]
    assert shown.startswith(f"Requests named 2026-002 in {log}: 0 pending, 1 carried")
    code, out, _ = run("log", "submit", log, "--forget", "3")
    assert code == 0 and out.startswith("Entered before in") and "carried out, 2" in out
    assert "To carry out" not in out


def test_a_person_is_stored_as_a_keyed_hash(run, answer, log, owners, tmp_path):
    words = (*TRAIN, "--owners", owners, "--forget-person")
    code, out, err = run("log", "submit", log, *words, "p03")
    assert (code, err) == (0, "")
    key = (tmp_path / "deletions.db.key").read_text().strip()
    assert f"{log}.key" in out and key not in out and b"p03" not in log.read_bytes()
    found = answer("log", "submit", log, *words, "p04", "--forget-person", "twin")
    assert [row["indices"] for row in found["submitted"]] == [[5], [5]]
    requests = DeletionRequests(log, 120, OWNERS)
    (own,) = requests.submitted_by("p03")
    assert own.indices == (3, 17) and len(requests.pending) == 3
    done = answer(*UNLEARN, *words[2:], "p03", *LOG, log, "--out", tmp_path / "run")
    assert done["request_id"] == own.request_id
    assert [own.request_id] == [
        row["request_id"]
        for row in answer("log", "list", log, "--person", "p03")["requests"]
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--forget", "3"), "--data: no request in "),
        ((*TRAIN, "--forget", "120"), "--forget must be in [0, 120), got 120"),
        ((*TRAIN, "--forget", "a.txt"), "--forget: no such file: a.txt"),
        ((*TRAIN,), "one of the arguments --forget --forget-person is required"),
        ((*TRAIN, "--forget-person", "p03"), "--forget-person: no file lists"),
        (
            (*TRAIN, "--forget-person", "p9", "--owners", "FILE"),
            "--forget-person: p9 is not one of the 3 persons",
        ),
        (
            (*TRAIN, *("--forget-person", "p03") * 2, "--owners", "FILE"),
            "a person is named twice",
        ),
        (
            (*TRAIN, *("--forget-person", "p03", "--request-id", "p03"))
            + ("--owners", "FILE"),
            "--request-id: it is the person's id",
        ),
        (("--data", "cli_project:nothing", "--forget", "3"), "--data"),
    ],
)
def test_what_cannot_be_submitted_makes_no_log(run, log, owners, words, message):
    words = [owners if word == "FILE" else word for word in words]
    code, out, err = run("log", "submit", log, *words)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not log.exists() and not log.with_name("deletions.db.key").exists()


def test_another_training_set_than_that_of_the_log(run, answer, log):
    answer("log", "submit", log, *TRAIN, "--forget", "3")
    before = log.read_bytes()
    for other, message in (
        ("other_set", "--data: data_set must be TensorDataset:120"),
        ("test_set", "--data: num_examples must be 120"),
    ):
        words = ("--data", f"cli_project:{other}", "--forget", "5")
        code, _, err = run("log", "submit", log, *words)
        assert code == 2 and message in err and err.count("\n") == 1
    words = ("--forget", "5", "--request-id")
    answer("log", "submit", log, *words, "x")
    code, _, err = run("log", "submit", log, "--forget", "6", "--request-id", "x")
    assert code == 2 and "--request-id 'x' was submitted before for other" in err
    assert before != log.read_bytes() and len(list_requests(log)) == 2


def test_after_the_data_of_forgotten_examples_were_erased(answer, log, tmp_path):
    answer(*UNLEARN, "--forget", "3,4", *LOG, log, "--out", tmp_path / "a")
    words = ("--data", "cli_project:without_erased", "--forget", "7")
    (row,) = answer("log", "submit", log, *words)["submitted"]
    assert row["indices"] == [7] and row["state"] == "pending"


# ------------------------------------------------------------------ list


@pytest.fixture
def kept(answer, log, tmp_path):
    """A log with one request that was carried out, and one that is pending."""
    words = ("--forget", "3", "--request-id", "2026-001", "--out", tmp_path / "a")
    answer(*UNLEARN, *words, *LOG, log)
    answer("log", "submit", log, "--forget", "5,6", "--request-id", "2026-002")
    return log


def test_the_list_says_what_is_pending(run, answer, kept):
    found = answer("log", "list", kept)
    first, second = found["requests"]
    assert first["state"] == "carried out" and first["done_entry"] == 3
    assert second["state"] == "pending" and second["indices"] == [5, 6]
    assert (found["num_pending"], found["num_carried_out"]) == (1, 1)
    assert found["head"] == verify(kept).head
    pending = answer("log", "list", kept, "--pending")
    assert pending["requests"] == [second] and pending["num_carried_out"] == 1
    code, out, err = run("log", "list", kept)
    assert (code, err) == (0, "") and "1 pending, 1 carried out, 0 redacted." in out
    assert "2026-001" in out and "(entry 3)" in out and found["head"] in out


def test_the_list_changes_nothing(run, kept, tmp_path):
    kept.chmod(0o444)
    before = {p: (p.stat().st_mode, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert run("log", "list", kept)[0] == 0
    after = {p: (p.stat().st_mode, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert before == after


def test_the_list_in_a_file_is_for_the_owner_only(run, kept, tmp_path):
    path = tmp_path / "requests.json"
    assert run("log", "list", kept, "--out", path)[0] == 0
    assert len(json.loads(path.read_text())["requests"]) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    code, _, err = run("log", "list", kept, "--out", kept)
    assert code == 2 and "is named twice" in err and len(list_requests(kept)) == 2


def test_without_the_key_no_person_is_found(run, answer, log, owners):
    words = (*TRAIN, "--owners", owners, "--forget-person", "p03")
    answer("log", "submit", log, *words)
    key = log.with_name("deletions.db.key")
    kept = key.read_bytes()
    other = "ab" * 32
    for content, message in ((None, "must exist"), (other, "another one")):
        key.unlink() if content is None else key.write_text(content)
        code, out, err = run("log", "list", log, "--person", "p03")
        assert (code, out) == (2, "") and message in err and "LOG: " in err
        assert other not in err and kept.decode().strip() not in err
        assert answer("log", "list", log)["num_pending"] == 1
    key.write_bytes(kept)
    assert answer("log", "list", log, "--person", "p04")["requests"] == []
    code, out, _ = run("log", "list", log, "--person", "P03")
    assert code == 0 and "The log has no request of P03. Names are stored as" in out
    assert "has no request" not in run("log", "list", log, "--person", "p03")[1]


def test_one_request_with_its_guarantee(run, answer, log, tmp_path):
    words = (*UNLEARN, "--ledger", "ledger.safetensors", "--log", log)
    for name, example in (("a", 3), ("b", 5)):
        named = ("--forget", example, "--request-id", name)
        answer(*words, *named, "--out", tmp_path / name)
    found = answer("log", "list", log, "--request-id", "a")
    assert [row["request_id"] for row in found["requests"]] == ["a"]
    first, last = found["guarantees"]
    assert first["guarantee"] == "certified if" and first["epsilon"] > 0
    assert last["guarantee"] == "empirical" and last["epsilon"] is None
    text = run("log", "list", log, "--request-id", "a")[1]
    assert "Guarantee: certified if; ε ≤" in text and "no ε is claimed" in text
    code, _, err = run("log", "list", log, "--request-id", "c")
    assert code == 2 and "--request-id: c is not the name of a request" in err


def test_examples_that_were_forgotten_before_cost_nothing(run, answer, log, tmp_path):
    words = (*UNLEARN, *LOG, log, "--forget")
    answer(*words, "3,17", "--request-id", "a", "--out", tmp_path / "a")
    weights = log.with_name("deletions.db.safetensors").read_bytes()
    text = run("log", "submit", log, "--forget", "3", "--request-id", "b")[1]
    assert "All of its examples were forgotten before, by earlier requests" in text
    code, text, err = run(*words, "3", "--request-id", "b", "--out", tmp_path / "b")
    assert (code, err) == (0, "") and (tmp_path / "b" / "record.json").exists()
    assert "All examples of request b were forgotten before" in text
    assert "Nothing is left to do." in text
    assert log.with_name("deletions.db.safetensors").read_bytes() == weights
    assert answer("log", "list", log)["num_carried_out"] == 2
    text = run("log", "submit", log, "--forget", "3,5", "--request-id", "c")[1]
    assert "1 of its examples was forgotten before" in text
    out = ("--request-id", "c", "--out", tmp_path / "c")
    assert answer(*words, "3,5", *out)["carried_out"]


def test_a_log_that_lost_its_last_entries_is_refused(run, kept):
    whole = kept.read_bytes()
    fresh = kept.with_name("fresh.db")
    DeletionRequests(fresh, 120).submit("other", indices=[9])
    kept.write_bytes(fresh.read_bytes())  # the weights beside it are those of before
    code, _, err = run("log", "list", kept)
    assert code == 2 and "does not have the weights that honour" in err
    kept.write_bytes(whole)
    assert run("log", "list", kept)[0] == 0


# ------------------------------------------------------------------ export, redact


def test_an_auditor_sees_what_is_disclosed(run, answer, kept, tmp_path):
    path = tmp_path / "for_auditor.json"
    found = answer("log", "export", kept, "--out", path)
    assert found["num_entries"] == 5 and found["disclosed"] == []
    assert all(entry.payload is None for entry in exported_entries(path))
    assert b"2026-001" not in path.read_bytes()
    again = answer("log", "export", kept, "--out", path)  # a newer one replaces it
    assert again["head"] == found["head"]
    one = tmp_path / "one.json"
    found = answer("log", "export", kept, "--disclose", "2026-001", "--out", one)
    assert found["disclosed"] == [1, 3] and found["for_owner_only"] == []
    shown = [entry.payload is not None for entry in exported_entries(one)]
    assert shown == [False, True, False, True, False]
    assert b"seed" not in one.read_bytes() and b"fingerprint" not in one.read_bytes()
    code, out, _ = run("verify", one, found["head"])
    assert code == 0 and found["head"] in out


def test_what_an_earlier_release_wrote_about_a_run_is_withheld(run, log, tmp_path):
    """Its entry has the seed of the run beside the facts that may be shown."""
    DeletionRequests(log, 120).submit("2026-001", indices=[3])
    weights = log.with_name("deletions.db.safetensors")
    write_weights(weights, UNLEARNED_WEIGHTS, {}, HONOURED)
    facts = {"requests": [0], "weights_sha256": sha256_of(weights)}
    DeletionLog(log).append("done", {**facts, "run": {"seed": 7}})
    path = tmp_path / "one.json"
    code, out, _ = run("log", "export", log, "--disclose", "2026-001", "--out", path)
    assert code == 0 and "is disclosed: 0.\nNot disclosed: 1. An earlier" in out
    assert [e.payload is None for e in exported_entries(path)] == [False, True]
    assert b"seed" not in path.read_bytes()
    assert run("verify", log)[0] == run("verify", path)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--disclose", "2026-009", "--out", "NEW"), "--disclose: 2026-009 is not the"),
        (("--out", "LOG"), "is named twice"),
        (("--out", "no/x.json"), "argument --out: no/x.json cannot be written"),
        ((), "the following arguments are required: --out"),
    ],
)
def test_what_cannot_be_exported_writes_nothing(run, kept, tmp_path, words, message):
    before = kept.read_bytes()
    places = {"LOG": kept, "NEW": tmp_path / "new.json"}
    code, out, err = run("log", "export", kept, *(places.get(w, w) for w in words))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert kept.read_bytes() == before and not (tmp_path / "new.json").exists()


def test_a_request_is_redacted_once_it_was_carried_out(run, answer, kept, tmp_path):
    words = ("log", "redact", kept, "--request-id")
    code, _, err = run(*words, "2026-002")
    assert code == 2 and "--request-id must name a request that was carried out" in err
    assert "opacus-pi unlearn --log" in err
    code, _, err = run(*words, "2026-009")
    assert code == 2 and "--request-id must name a request of this log" in err
    found = answer(*words, "2026-001", "--reason", "retention is over")
    assert found["redacted"] == 1 and found["head"] == verify(kept).head
    assert b"2026-001" not in kept.read_bytes() and verify(kept).redacted == (1,)
    (redaction,) = [e for e in DeletionLog(kept).entries() if e.kind == "redaction"]
    assert redaction.payload == {"entry": 1, "reason": "retention is over"}
    rows = answer("log", "list", kept)["requests"]
    assert [row["state"] for row in rows] == ["redacted", "pending"]
    code, out, _ = run("log", "list", kept)
    assert code == 0 and "(redacted)" in out
    assert (rows[0]["redaction_entry"], rows[0]["redaction_time"]) == (
        redaction.number,
        redaction.time,
    )
    assert f"redacted, {redaction.time} (entry {redaction.number})" in out
    assert rows[0]["done_entry"] == 3 and "(entry 3)" not in out
    out = tmp_path / "x.json"
    code, _, err = run("log", "export", kept, "--disclose", "2026-001", "--out", out)
    assert code == 2 and "it was redacted" in err
    code, _, err = run(*words, "2026-001")
    assert code == 2 and "No such request was submitted, or it was redacted" in err


def test_a_mistake_is_withdrawn(run, answer, kept, owners, tmp_path):
    code, _, err = run("log", "submit", kept, "--forget", "7", "--request-id", "2026-1")
    assert code == 0
    code, _, err = run("log", "submit", kept, "--forget", "8", "--request-id", "2026-1")
    assert code == 2 and "log withdraw" in err and "--request-id 2026-1'" in err
    words = ("log", "withdraw", kept, "--request-id")
    for name, message in (
        ("2026-001", "--request-id must name a pending request"),
        ("2026-009", "--request-id must name a request of this log"),
    ):
        code, out, err = run(*words, name)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    code, out, _ = run(*words, "2026-1", "--reason", "a typing error")
    assert code == 0 and "Request 2026-1 is withdrawn (entry 6 of" in out
    assert verify(kept).head in out
    found = answer("log", "list", kept)
    assert (found["num_withdrawn"], found["num_pending"]) == (1, 1)
    assert found["requests"][2]["withdrawal_entry"] == 6
    out = run("log", "list", kept)[1]
    assert "0 redacted, 1 withdrawn." in out and "(entry 6)" in out
    one = tmp_path / "one.json"
    found = answer("log", "export", kept, "--disclose", "2026-1", "--out", one)
    assert found["disclosed"] == [5, 6] and b"a typing error" in one.read_bytes()
    found = answer("plan", "ledger.safetensors", "--forget", "9", "--log", kept)
    assert found["pending"] == ["2026-002"]
    found = answer(*UNLEARN, "--pending", *LOG, kept, "--out", tmp_path / "b")
    assert found["request_ids"] == ["2026-002"]
    code, _, err = run("log", "submit", kept, "--forget", "7", "--request-id", "2026-1")
    assert code == 2 and "was withdrawn. Use another name" in err


def test_an_unnamed_request_that_was_withdrawn_is_not_used_again(answer, log, owners):
    for words in (
        ("--forget", "3"),
        ("--owners", owners, "--forget-person", "p03"),
    ):
        (first,) = answer("log", "submit", log, *TRAIN, *words)["submitted"]
        answer("log", "withdraw", log, "--request-id", first["request_id"])
        (again,) = answer("log", "submit", log, *TRAIN, *words)["submitted"]
        assert again["state"] == "pending" and not again["entered_before"]


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("withdraw", "--request-id", "x"),
        ("export", "--out", "new.json"),
        ("redact", "--request-id", "x"),
    ],
)
def test_only_submit_makes_a_log(run, tmp_path, words):
    action, *more = words
    code, out, err = run("log", action, tmp_path / "none.db", *more)
    assert (code, out) == (2, "") and f"LOG: no such file: {tmp_path}/none.db" in err
    for other in ("ledger.safetensors", "cli_project.py"):
        code, out, err = run("log", action, other, *more)
        assert (code, out) == (2, "") and "LOG: path must be a deletion log" in err
        assert other in err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("action", ["submit", "list", "withdraw", "export", "redact"])
def test_an_edited_log_is_named(run, kept, tmp_path, action):
    content = kept.read_bytes()
    kept.write_bytes(content.replace(b"[5,6]", b"[5,7]"))
    before = kept.read_bytes()
    assert before != content
    more = {
        "submit": ("--forget", "7"),
        "export": ("--out", tmp_path / "x.json"),
        "redact": ("--request-id", "2026-001"),
        "withdraw": ("--request-id", "2026-002"),
    }
    code, out, err = run("log", action, kept, *more.get(action, ()))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "LOG: " in err and "deletions.db" in err and "Restore the file" in err
    assert kept.read_bytes() == before and not (tmp_path / "x.json").exists()
