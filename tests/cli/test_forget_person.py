"""A person named on the command line stands for his or her examples."""

import json
from dataclasses import replace

import pytest

from opacus_pi.ledger import fingerprint
from opacus_pi.unlearning.deletion_log import read_entries
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, LOG, MODEL, owners_file

OWNERS = {"p03": [17, 3], "p04": [5], "both": [3, 5], "out": [3, 120], "none": []}
PLAN = ("plan", "ledger.safetensors")
UNLEARN = ("unlearn", *MODEL, *DATA, "--epochs", "1")
EVALUATE = ("evaluate", *MODEL, *DATA)


@pytest.fixture
def owners(project, tmp_path):
    return owners_file(tmp_path / "owners.json", OWNERS)


def numbers(found):
    """An answer without the other persons of the examples."""
    return {name: fact for name, fact in found.items() if name != "also_of"}


@pytest.mark.parametrize("command", [PLAN, EVALUATE])
def test_a_person_is_the_positions(answer, owners, command):
    file = ("--owners", owners)
    one = answer(*command, "--forget-person", "p03", *file)
    assert numbers(one) == numbers(answer(*command, "--forget", "3,17"))
    assert one["num_forget"] == 2
    several = [x for name in ("p03", "both") for x in ("--forget-person", name)]
    two = answer(*command, *several, *file)
    assert numbers(two) == numbers(answer(*command, "--forget", "3,5,17"))


def test_unlearning_a_person_without_a_log(answer, owners, tmp_path):
    persons = ("--forget-person", "p03", "--forget-person", "p04", "--owners", owners)
    answer(*UNLEARN, *persons, "--out", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["forget_indices"] == [3, 5, 17]


def test_the_log_knows_the_person_by_a_keyed_hash(run, answer, owners, tmp_path):
    log, out = tmp_path / "deletions.db", tmp_path / "run"
    words = (*UNLEARN, "--owners", owners, *LOG, log, "--forget-person")
    first = answer(*words, "p03", "--out", out)
    requests = DeletionRequests(log, 120, OWNERS)
    (request,) = requests.submitted_by("p03")
    assert request.request_id == first["request_id"] and request.indices == (3, 17)
    assert requests.submitted_by("p04") == []
    (entry,) = (entry for entry in read_entries(log) if entry.kind == "request")
    named = {"indices", "num_examples", "user_hash", "user_key"}
    assert set(entry.payload) == named
    files = [log, *(path for path in out.iterdir())]
    assert all(b"p03" not in path.read_bytes() for path in files)
    again = answer(*words, "p03", "--out", tmp_path / "again")
    assert again["carried_out"] is False and again["head"] == first["head"]
    name = ("--request-id", first["request_id"], "--out", tmp_path / "other")
    owners_file(owners, {**OWNERS, "twin": [3, 17]})
    code, _, err = run(*words, "twin", *name)
    assert code == 2 and "was submitted before, but not for this person" in err
    kinds = [entry.kind for entry in read_entries(log)]
    assert kinds == ["training set", "request", "remaining", "done"]
    second = answer(*words, "twin", "--out", tmp_path / "twin")
    assert second["request_id"] != first["request_id"]
    assert second["forgotten_before"] == [second["request_id"]]  # the same examples
    assert len(requests.submitted_by("twin")) == 1 and not requests.pending


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir())


PERSON = ("--forget-person", "p03")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PERSON, "--forget", "3"), "not allowed with argument"),
        ((), "--forget --forget-person"),
        (PERSON, "--forget-person: no file lists the examples. Add --owners"),
        (("--forget", "3", "--owners", "FILE"), "--owners: no person is named"),
        (
            ("--forget-person", "p3", "--owners", "FILE"),
            "--forget-person: p3 is not one of the 5 persons in",
        ),
        (
            ("--forget-person", "3", "--owners", "FILE"),
            "positions of examples are named with --forget",
        ),
        (
            ("--forget", "p03"),
            "no such file: p03. List ids as 3,17,25, or name a file of them; persons "
            "are named with --forget-person ID --owners FILE.json. Ids are positions",
        ),
        (("--forget-person", "none", "--owners", "FILE"), "none has no examples in"),
        ((*PERSON, *PERSON, "--owners", "FILE"), "a person is named twice"),
        ((*PERSON, "--owners", "nothing.json"), "--owners: no such file"),
        (("--forget-person", "P03", "--owners", "FILE"), "Did you mean p03?"),
        (("--forget-person", "out", "--owners", "FILE"), "owners.json (out) must be"),
    ],
)
@pytest.mark.parametrize("command", [PLAN, EVALUATE, UNLEARN])
def test_errors_write_nothing(run, owners, tmp_path, command, words, message):
    more = ("--out", tmp_path / "run", *LOG, tmp_path / "log.db")
    words = [owners if word == "FILE" else word for word in words]
    code, out, err = run(*command, *words, *(more if command is UNLEARN else ()))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert leftovers(tmp_path) == ["owners.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("p03: 3", "is not JSON. Write a JSON object"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[3, 17]", "does not map persons to lists of whole numbers"),
        ('[["p03", [3]]]', "does not map persons"),
        ('{"p03": 3}', "does not map persons"),
        ('{"p03": "Faces:120"}', "does not map persons"),
        ('{"data_set": "a", "data_set": "b", "p03": [3]}', "lists a person twice"),
        ('{"p03": [true]}', "does not map persons"),
        ('{"p03": [3.0]}', "does not map persons"),
        ('{"p03": {"3": 4}}', "does not map persons"),
        ('{"p03": [3], "p03": [4]}', "lists a person twice"),
        ('{"data_set": "NAME", "p03": [3, 17, 3]}', "lists a position of p03 twice"),
        ('{"data_set": "NAME", "p03": [-1]}', "a position of p03 that is out of range"),
        (
            f'{{"data_set": "NAME", "p03": [{10**30}]}}',
            "a position of p03 that is out of range",
        ),
    ],
)
def test_bad_files(run, owners, content, message):
    name = json.loads(owners.read_text())["data_set"]
    if isinstance(content, str):
        content = content.replace("NAME", name).encode()
    owners.write_bytes(content)
    code, out, err = run(*PLAN, *PERSON, "--owners", owners)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


SCORE = ("score", "ledger.safetensors")


@pytest.mark.parametrize("command", [PLAN, EVALUATE, UNLEARN, SCORE])
def test_a_file_of_another_data_set_is_refused(run, owners, tmp_path, command):
    import cli_project

    name = fingerprint(cli_project.train_set())
    person = () if command is SCORE else PERSON
    words = (*command, *person, "--owners", owners)
    out = iter(range(3))

    def tried(data_set):
        persons = {k: v for k, v in OWNERS.items() if k != "out"}
        owners.write_text(json.dumps({**persons, "data_set": data_set}))
        more = ("--out", tmp_path / f"run{next(out)}") if command is UNLEARN else ()
        return run(*words, *more)

    assert tried(name)[0] == 0
    code, said, err = tried(fingerprint(cli_project.other_set()))
    assert code == 2 and said == "" and err.count("\n") == 1
    assert "was made for another data set, which differs from this one in labels" in err
    code, _, err = tried([5])  # not a person with this id
    assert code == 2 and '"data_set" that is not a text' in err


def test_what_is_checked_of_the_file_is_said(run, owners):
    code, out, _ = run("verify", owners)
    assert code == 3 and "positions by person, as --owners takes them" in out
    owners.write_text(json.dumps({**OWNERS, "data_set": "Faces:120"}))
    assert "this file has one" in run("verify", owners)[1]
    owners.write_text(json.dumps(OWNERS))
    assert "this file has none" in run("verify", owners)[1]
    owners.write_text("{}")
    assert "is JSON: it is not an opacus_pi file" in run("verify", owners)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--forget-person", "p04", "--request-id", "x"),
            "Leave it out: then each request has a random name, which is printed. To "
            "choose the names, call 'opacus-pi log submit' with --request-id once for",
        ),
        (("--request-id", "p03"), "--request-id: it is the person's id"),
    ],
)
def test_what_a_log_cannot_take(run, owners, tmp_path, words, message):
    more = (*LOG, tmp_path / "log.db", "--out", tmp_path / "run")
    code, _, err = run(*UNLEARN, *PERSON, "--owners", owners, *words, *more)
    assert code == 2 and message in err and leftovers(tmp_path) == ["owners.json"]


TWO = ("--forget-person", "p03", "--forget-person", "p04")


def test_two_persons_have_two_requests_and_one_run(run, answer, owners, tmp_path):
    log, out = tmp_path / "deletions.db", tmp_path / "run"
    ledger = ("--ledger", "ledger.safetensors")
    words = (*UNLEARN, *ledger, "--owners", owners, "--log", log, *TWO)
    found = answer(*words, "--out", out)
    assert found["request_id"] is None and found["carried_out"]
    requests = DeletionRequests(log, 120, OWNERS)
    assert not requests.pending
    of = [requests.submitted_by(name)[0] for name in ("p03", "p04")]
    assert [request.request_id for request in of] == found["request_ids"]
    assert [request.indices for request in of] == [(3, 17), (5,)]
    record = json.loads((out / "record.json").read_text())
    assert record["forget_indices"] == [3, 5, 17] and not record["forgotten_before"]
    assert found["guarantee"]["kind"] == "certified if"  # empirical, if one by one
    code, text, _ = run(*words, "--out", tmp_path / "again")
    assert code == 0 and text.count("was carried out before.") == 2
    assert "Nothing is left to do. Written to" in text


def test_submitting_for_two_persons_says_whose_request_is_whose(run, owners, tmp_path):
    words = ("log", "submit", tmp_path / "deletions.db", *DATA[:2], "--owners", owners)
    code, text, _ = run(*words, *TWO)
    assert code == 0 and " for p03: 2 examples" in text and " for p04: 1 ex" in text
    other = ("log", "submit", tmp_path / "b.db", *DATA[:2], "--owners", owners)
    assert " for p03" not in run(*other, *TWO[:2])[1]


def test_two_persons_of_whom_one_was_forgotten_before(run, owners, tmp_path):
    log = tmp_path / "deletions.db"
    DeletionRequests(log, 120).submit("late", indices=[9])
    first = ("--owners", owners, *LOG, log, "--forget-person", "p04")
    assert run(*UNLEARN, *first, "--out", tmp_path / "one")[0] == 0
    DeletionRequests(log, 120).submit("later", indices=[8])
    words = (*UNLEARN, "--owners", owners, *LOG, log, *TWO)
    code, text, err = run(*words, "--out", tmp_path / "two")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "two" / "record.json").read_text())
    assert record["forget_indices"] == [3, 8, 17]
    assert record["forgotten_before"] == [5, 9]
    assert text.startswith("Forgot 3 examples") and "was carried out before." in text
    assert "Request later was still pending in the log: its examples were" in text
    assert " for p03, " in text and " for p04. Keep the head" in text


@pytest.mark.parametrize("command", [PLAN, EVALUATE, UNLEARN, SCORE])
def test_a_file_that_names_no_data_set_is_refused(run, owners, tmp_path, command):
    owners.write_text(json.dumps(OWNERS))
    words = (*command, *(() if command is SCORE else PERSON), "--owners", owners)
    more = ("--out", tmp_path / "run", *LOG, tmp_path / "d.db")
    code, out, err = run(*words, *(more if command is UNLEARN else ()))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "does not name the data set that its positions count" in err
    assert "use the file that was made before" in err
    assert leftovers(tmp_path) == ["owners.json"]


def test_a_file_made_again_after_photos_were_erased(run, answer, owners, tmp_path):
    import cli_project

    log = (*LOG, tmp_path / "d.db")
    first = (*UNLEARN, *log, "--forget", "3,4", "--out", tmp_path / "first")
    answer(*first)
    erased = [
        "cli_project:without_erased" if word == DATA[1] else word for word in UNLEARN
    ]
    words = (*erased, *log, "--owners", owners, "--forget-person", "p05")
    # p05 had 20; in a file of the 118 remaining examples it is 18.
    made_again = {"p05": [18], "data_set": fingerprint(cli_project.without_erased())}
    before = (tmp_path / "d.db").read_bytes()
    for content in (made_again, {"p05": [18]}):
        owners.write_text(json.dumps(content))
        code, _, err = run(*words, "--out", tmp_path / "second")
        assert code == 2 and "erased since" in err
        assert (tmp_path / "d.db").read_bytes() == before
    owners_file(owners, {"p05": [20]})  # the file of before
    evaluate = ["cli_project:without_erased" if w == DATA[1] else w for w in EVALUATE]
    code, _, err = run(*evaluate, "--owners", owners, "--forget-person", "p05")
    assert code == 2 and "add --log with the deletion log that names them" in err
    assert "If files were added since, leave them out" in err
    answer(*evaluate, *log[1:], "--owners", owners, "--forget-person", "p05")
    answer(*words, "--out", tmp_path / "second")
    record = json.loads((tmp_path / "second" / "record.json").read_text())
    assert record["forget_indices"] == [20]


def test_what_cannot_be_compared_is_said(run, ledger, owners, tmp_path):
    replace(ledger, data_set=None).save(tmp_path / "ledger")
    code, _, err = run("plan", tmp_path / "ledger", *PERSON, "--owners", owners)
    assert code == 0 and err.startswith("warning: --owners: whether")


ONLY = (*PERSON, "--only", "17", "--owners")


def test_some_examples_of_a_person(run, answer, owners, tmp_path):
    log = tmp_path / "d.db"
    assert answer(*PLAN, *ONLY, owners) == answer(*PLAN, "--forget", "17")
    (row,) = answer("log", "submit", log, *DATA[:2], *ONLY, owners)["submitted"]
    assert row["indices"] == [17]
    text = run("log", "submit", log, *ONLY, owners)[1]
    assert (
        f"call 'opacus-pi unlearn --pending --log {log} --ledger LEDGER --model" in text
    )
    answer(*UNLEARN, *ONLY, owners, *LOG, log, "--out", tmp_path / "run")
    found = answer("log", "list", log, "--person", "p03")
    assert [row["indices"] for row in found["requests"]] == [[17]]
    assert found["num_carried_out"] == 1 and b"p03" not in log.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--forget", "3", "--only", "3"), "--only: it chooses among"),
        ((*PERSON, "--only", "4"), "--only: example 4 is not of p03, whose positions"),
        ((*PERSON, "--only", ""), "--only: nothing is listed"),
        (
            (*PERSON, "--forget-person", "p04", "--only", "3"),
            "--only: it chooses among the examples of one person",
        ),
    ],
)
def test_what_only_cannot_choose(run, owners, words, message):
    more = ("--owners", owners) if "--forget-person" in words else ()
    code, out, err = run(*PLAN, *words, *more)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_an_example_of_two_persons_is_forgotten_for_both(run, answer, owners, tmp_path):
    """One of them asks; the other's own request then finds it forgotten before."""
    log, file = tmp_path / "d.db", ("--owners", owners)
    owners_file(owners, {"ann": [3, 17], "bob": [17, 20], "eve": [40]})
    ann = ("--forget-person", "ann", *file)
    shared = {"17": ["bob"]}
    assert answer(*PLAN, *ann)["also_of"] == shared
    code, out, _ = run(*PLAN, *ann)
    assert code == 0 and out.startswith("Also of other persons (bob): example 17. ")
    submitted = answer("log", "submit", log, *DATA[:2], *ann)
    assert submitted["also_of"] == shared
    done = answer(*UNLEARN, *ann, *LOG, log, "--out", tmp_path / "a")
    assert done["also_of"] == shared and b"bob" not in log.read_bytes()
    code, out, _ = run("log", "list", log, "--person", "bob")
    assert code == 0 and "An example of several persons may have been forgotten" in out

    bob = ("--forget-person", "bob", *file)
    code, out, _ = run("log", "submit", log, *bob)
    assert code == 0 and "1 of its examples was forgotten before" in out
    answer(*UNLEARN, *bob, *LOG, log, "--out", tmp_path / "b")
    shown = json.loads((tmp_path / "b" / "guarantee_to_show.json").read_text())
    assert shown["num_forgotten"] == 3  # 3, 17 and 20: each once
    assert shown["num_requested"] == 2

    answer("log", "submit", log, "--forget", "50")
    owners_file(owners, {"ann": [3, 17], "bob": [17, 20], "eve": [40], "tom": [40]})
    eve = ("--forget-person", "eve", *file)
    out = run(*UNLEARN, *eve, *LOG, log, "--out", tmp_path / "c")[1]
    assert "Also of other persons (tom): example 40." in out
    assert "This is about the examples that this command names" in out
    owners_file(owners, {"ann": [3, 17], "bob": [17, 20], "eve": [40]})

    both = (*ann, "--forget-person", "bob")
    assert answer(*PLAN, *both)["also_of"] == {}  # all of its owners ask
    eve = ("--forget-person", "eve", *file)
    assert answer(*PLAN, *eve)["also_of"] == {}
    assert "Also of" not in run(*PLAN, *eve)[1]
