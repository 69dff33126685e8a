"""``unlearn --log`` that ends anywhere: the same command leaves what one run leaves."""

import json

import pytest

from opacus_pi.cli import run_files
from opacus_pi.cli import unlearn as command
from opacus_pi.unlearning import requests as requests_module
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from opacus_pi.unlearning.deletion_statements import DeletionStatement
from tests.cli.conftest import DATA, LOG, MODEL
from tests.unlearning.test_deletion_log import leave_unfinished_write

UNLEARN = ("unlearn", *MODEL, *DATA, "--epochs", "1", "--learning-rate", "0.05")
LEDGER = ("--ledger", "ledger.safetensors", "--seed", "4")
TIMES = {"started", "finished", "seconds", "files", "checksum"}
STEPS = [
    *((DeletionLog, "append", number) for number in range(4)),
    (requests_module, "store_weights", 0),
    (command, "save_result", 0),
    (run_files, "_give_name", 0),
]


class Killed(BaseException):
    pass


def die(monkeypatch, place, name, number, *, after):
    """End at the ``number``-th call of a function, before or after it does its work."""
    real, calls = getattr(place, name), []

    def dying(*args, **options):
        calls.append(name)
        is_last = len(calls) == number + 1
        if is_last and not after:
            raise Killed
        result = real(*args, **options)
        if is_last:
            raise Killed
        return result

    monkeypatch.setattr(place, name, dying)


def without_times(content):
    return {name: value for name, value in content.items() if name not in TIMES}


def left_by(folder):
    """What a run leaves: files without times, entries without hashes of other files."""
    out = folder / "out"
    entries = [
        (e.kind, e.name, {k: v for k, v in e.payload.items() if k != "weights_sha256"})
        for e in DeletionLog(folder / "d.db").entries()
    ]
    for _, _, payload in entries:
        if "run" in payload:
            payload["run"] = without_times(payload["run"])
    shown = DeletionStatement.load(out / "guarantee_to_show.json")
    return {
        "entries": entries,
        "files": sorted(path.name for path in out.iterdir()),
        "record": without_times(json.loads((out / "record.json").read_text())),
        "guarantee": (out / "guarantee.json").read_text(),
        "trace": without_times(json.loads((out / "trace.json").read_text())["metrics"]),
        "shown": (shown.guarantee, shown.requests, shown.num_forgotten, shown.weights),
    }


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("place", "name", "number"), STEPS)
def test_the_same_command_leaves_what_one_run_leaves(
    run, tmp_path, monkeypatch, uninterrupted, place, name, number, after
):
    def words(folder):
        log = ("--log", folder / "d.db", "--out", folder / "out")
        return (*UNLEARN, *LEDGER, "--forget", "3", "--request-id", "C1", *log)

    if not uninterrupted:
        (tmp_path / "whole").mkdir()
        assert run(*words(tmp_path / "whole"))[0] == 0
        uninterrupted |= left_by(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    with monkeypatch.context() as patched:
        die(patched, place, name, number, after=after)
        with pytest.raises(Killed):
            run(*words(folder))
    if not (folder / "out").exists():
        code, text, err = run(*words(folder))
        assert (code, err) == (0, "") and "guarantee for FineTune" in text
        assert "forgotten before, by earlier requests" not in text
    assert left_by(folder) == uninterrupted
    verify(folder / "d.db")


def test_a_result_that_was_lost_or_never_needed_a_run_is_written_again(
    run, answer, tmp_path
):
    log = ("--log", tmp_path / "d.db")
    for name, examples in (("a", "3"), ("b", "17,40")):
        more = ("--forget", examples, "--request-id", name, "--out", tmp_path / name)
        assert answer(*UNLEARN, *LEDGER, *log, *more)["carried_out"]
    shown = DeletionStatement.load(tmp_path / "b" / "guarantee_to_show.json")
    for name, examples, requests in (
        ("b", "17,40", ("b",)),
        ("a", "3", ("a", "b")),  # the weights of run b honour a, too
        ("c", "3,40", ("b", "c")),
    ):
        out = tmp_path / f"again_{name}"
        more = ("--forget", examples, "--request-id", name, "--out", out)
        found = answer(*UNLEARN, *LEDGER, *log, *more)
        assert found["carried_out"] is False
        again = DeletionStatement.load(out / "guarantee_to_show.json")
        assert again.requests == requests
        assert again.guarantee == shown.guarantee and again.weights == shown.weights
        assert again.num_forgotten == 3
    for name in ("trace.json", "record.json"):  # the header of weights has no order
        mine, other = (
            json.loads((tmp_path / one / name).read_text()) for one in ("b", "again_b")
        )
        for found in (mine, other):
            found.pop("files", None)
            found.pop("checksum")
        assert mine == other and [*mine] == [*other]
    more = ("--forget", "3,40", "--request-id", "c", "--out", tmp_path / "text")
    code, text, err = run(*UNLEARN, *LEDGER, *log, *more)
    assert (code, err) == (0, "") and "d.db.safetensors" not in text
    assert f"Written to {tmp_path / 'text'}: the weights that honour every" in text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_write_to_the_log_that_was_killed_is_taken_back(answer, tmp_path):
    log = tmp_path / "d.db"
    more = (*LOG, log, "--forget")
    answer(*UNLEARN, *more, "3", "--out", tmp_path / "a")
    leave_unfinished_write(log)
    found = answer(*UNLEARN, *more, "17", "--out", tmp_path / "b")
    assert found["carried_out"] and verify(log).num_entries == 7


def test_all_pending_requests_are_carried_out_by_one_flag(run, answer, tmp_path):
    log = tmp_path / "d.db"
    data = ("--data", "cli_project:train_set")
    for name, examples in (("a", "3"), ("b", "17,40")):
        answer(
            *("log", "submit", log, *data, "--forget", examples, "--request-id", name)
        )
    words = (*UNLEARN, *LEDGER, "--pending", "--log", log, "--out")
    found = answer(*words, tmp_path / "run")
    assert found["request_ids"] == ["a", "b"] and found["carried_out"]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["forget_indices"] == [3, 17, 40] and record["requests"] == ["a", "b"]
    code, text, err = run(*words, tmp_path / "again")
    assert (code, err) == (0, "") and text.startswith("No request is pending. Nothing")
    assert left_names(tmp_path / "again") == left_names(tmp_path / "run")
    code, _, err = run(*words[:-2], tmp_path / "none.db", "--out", tmp_path / "x")
    assert code == 2 and "--log: no such file" in err
    assert not (tmp_path / "none.db").exists() and not (tmp_path / "x").exists()


def left_names(folder):
    return sorted(path.name for path in folder.iterdir())
