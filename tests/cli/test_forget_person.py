"""A person named on the command line stands for his or her examples."""

import json

import pytest

from opacus_pi.unlearning.deletion_log import read_entries
from opacus_pi.unlearning.requests import DeletionRequests
from tests.cli.conftest import DATA, MODEL

OWNERS = {"p03": [17, 3], "p04": [5], "both": [3, 5], "out": [3, 120], "none": []}
PLAN = ("plan", "ledger.safetensors")
UNLEARN = ("unlearn", *MODEL, *DATA, "--epochs", "1")
EVALUATE = ("evaluate", *MODEL, *DATA)


@pytest.fixture
def owners(tmp_path):
    path = tmp_path / "owners.json"
    path.write_text(json.dumps(OWNERS))
    return path


@pytest.mark.parametrize("command", [PLAN, EVALUATE])
def test_a_person_is_the_positions(answer, owners, command):
    file = ("--owners", owners)
    one = answer(*command, "--forget-person", "p03", *file)
    assert one == answer(*command, "--forget", "3,17") and one["num_forget"] == 2
    several = [x for name in ("p03", "both") for x in ("--forget-person", name)]
    assert answer(*command, *several, *file) == answer(*command, "--forget", "3,5,17")


def test_unlearning_a_person_without_a_log(answer, owners, tmp_path):
    persons = ("--forget-person", "p03", "--forget-person", "p04", "--owners", owners)
    answer(*UNLEARN, *persons, "--out", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["forget_indices"] == [3, 5, 17]


def test_the_log_knows_the_person_by_a_keyed_hash(run, answer, owners, tmp_path):
    log, out = tmp_path / "deletions.db", tmp_path / "run"
    words = (*UNLEARN, "--owners", owners, "--log", log, "--forget-person")
    first = answer(*words, "p03", "--out", out)
    requests = DeletionRequests(log, 120, OWNERS)
    (request,) = requests.submitted_by("p03")
    assert request.request_id == first["request_id"] and request.indices == (3, 17)
    assert requests.submitted_by("p04") == []
    (entry,) = (entry for entry in read_entries(log) if entry.kind == "request")
    named = {"data_set", "indices", "num_examples", "user_hash", "user_key"}
    assert set(entry.payload) == named
    files = [log, *(path for path in out.iterdir())]
    assert all(b"p03" not in path.read_bytes() for path in files)
    again = answer(*words, "p03", "--out", tmp_path / "again")
    assert again["carried_out"] is False and again["head"] == first["head"]
    name = ("--request-id", first["request_id"], "--out", tmp_path / "other")
    owners.write_text(json.dumps({**OWNERS, "twin": [3, 17]}))
    code, _, err = run(*words, "twin", *name)
    assert code == 2 and "was submitted before, but not for this person" in err
    assert len([*read_entries(log)]) == 2  # the request, and that it was carried out
    second = answer(*words, "twin", "--out", tmp_path / "twin")
    assert second["request_id"] != first["request_id"] and second["carried_out"]


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir())


PERSON = ("--forget-person", "p03")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PERSON, "--forget", "3"), "not allowed with argument"),
        ((), "one of the arguments --forget --forget-person is required"),
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
        (("--forget-person", "out", "--owners", "FILE"), "--owners must be"),
    ],
)
@pytest.mark.parametrize("command", [PLAN, EVALUATE, UNLEARN])
def test_errors_write_nothing(run, owners, tmp_path, command, words, message):
    more = ("--out", tmp_path / "run", "--log", tmp_path / "log.db")
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
        ('{"p03": [true]}', "does not map persons"),
        ('{"p03": [3.0]}', "does not map persons"),
        ('{"p03": {"3": 4}}', "does not map persons"),
        ('{"p03": [3], "p03": [4]}', "lists a person twice"),
        ('{"p03": [3, 17, 3]}', "lists a position of p03 twice"),
        ('{"p03": [-1]}', "a position of p03 that is out of range"),
        (f'{{"p03": [{10**30}]}}', "a position of p03 that is out of range"),
    ],
)
def test_bad_files(run, owners, content, message):
    owners.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run(*PLAN, *PERSON, "--owners", owners)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--forget-person", "p04"), "belongs to one person, got 2"),
        (("--request-id", "p03"), "--request-id: it is the person's id"),
    ],
)
def test_what_a_log_cannot_take(run, owners, tmp_path, words, message):
    more = ("--log", tmp_path / "log.db", "--out", tmp_path / "run")
    code, _, err = run(*UNLEARN, *PERSON, "--owners", owners, *words, *more)
    assert code == 2 and message in err and leftovers(tmp_path) == ["owners.json"]
