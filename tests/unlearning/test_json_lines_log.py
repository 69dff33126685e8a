"""Old logs are imported with everything in them, and are never changed."""

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from opacus_pi.unlearning import import_log
from opacus_pi.unlearning.deletion_log import START, read_entries, verify
from opacus_pi.unlearning.json_lines_log import verify_json_lines
from opacus_pi.unlearning.requests import (
    DeletionRequest,
    DeletionRequests,
    requested_indices,
)
from tests.unlearning.test_requests import SIZE, data, unlearner

OLD = Path(__file__).parent / "json_lines" / "deletions.jsonl"
ENDINGS = ("", ".safetensors")


@pytest.fixture
def old(tmp_path):
    """A log that release 0.1.0 wrote: four requests, of which three are done."""
    for end in ENDINGS:
        shutil.copy(f"{OLD}{end}", tmp_path)
    return tmp_path / "deletions.jsonl"


@pytest.fixture
def new(tmp_path):
    return tmp_path / "deletions.db"


def chained(entries):
    """The lines of an old log in an unbroken chain, from kinds and bodies."""
    lines, previous = [], START
    for number, (kind, body) in enumerate(entries):
        entry = {"number": number, "time": "2025-01-02T03:04:05+00:00", "kind": kind}
        entry |= {"body": body, "previous": previous}
        previous = hashlib.sha256(text(entry).encode()).hexdigest()
        lines.append(text({**entry, "hash": previous}) + "\n")
    return "".join(lines)


def text(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def test_everything_is_imported_and_nothing_is_changed(old, new):
    before = {path: path.read_bytes() for path in old.parent.iterdir()}
    log = import_log(old, new)
    assert {path: path.read_bytes() for path in before} == before
    lines = [json.loads(line) for line in old.read_text().splitlines()]
    *entries, last = log.entries()
    assert [e.number for e in entries] == [line["number"] for line in lines]
    assert [e.time for e in entries] == [line["time"] for line in lines]
    assert [e.kind for e in entries] == [line["kind"] for line in lines]
    assert [e.name for e in entries if e.kind == "request"] == ["a", "b", "c", "d"]
    assert last.kind == "import" and last.payload == {
        "file": "deletions.jsonl",
        "num_entries": 7,
        "head": lines[-1]["hash"],
        "num_bytes_cut_off": 0,
    }
    weights = Path(f"{new}.safetensors")
    assert weights.read_bytes() == before[Path(f"{old}.safetensors")]
    assert verify(new).num_entries == 8
    made = {path for path in old.parent.iterdir() if path not in before}
    assert {path.name for path in made} == {
        f"deletions.db{end}" for end in (*ENDINGS, ".key")
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}


def test_requests_go_on_from_an_imported_log(old, new):
    import_log(old, new)
    mine = DeletionRequests(new, SIZE)
    assert mine.pending == [DeletionRequest("d", (0,))]
    assert requested_indices(new, SIZE).tolist() == [0, 2, 3, 5, 8, 9]
    mine.redact("a")
    (result,) = mine.process(unlearner(), data(), num_epochs=1)
    assert result.record["forgotten_before"] == [2, 3, 5, 8, 9]
    mine.redact("d")
    assert mine.pending == []


def test_a_crash_before_done_was_written_is_made_up_for(old, new):
    """The weights of the old release name the requests that they honour."""
    lines = old.read_bytes().splitlines(keepends=True)
    old.write_bytes(b"".join(lines[:5]))
    import_log(old, new)
    mine = DeletionRequests(new, SIZE)
    assert [r.request_id for r in mine.pending] == ["c"]
    assert mine.process(unlearner(), data(), num_epochs=1) == []
    assert mine.pending == []


def test_users_names_become_keyed_hashes(old, new):
    import_log(old, new)
    assert b"ann" not in new.read_bytes()
    mine = DeletionRequests(new, SIZE)
    assert mine.submitted_by("ann") == [DeletionRequest("b", (8, 9))]
    assert import_log(old, f"{new}2", store_names=True).find("b").payload == {
        "indices": [8, 9],
        "user": "ann",
    }
    import_log(old, f"{new}3", key=b"k" * 32)
    assert not os.path.exists(f"{new}3.key")
    assert DeletionRequests(f"{new}3", SIZE, key=b"k" * 32).submitted_by("ann")


def test_only_the_requests_name_examples(old, new):
    entries = [*import_log(old, new).entries()]
    done = [e.payload for e in entries if e.kind == "done"]
    assert [p["requests"] for p in done] == [[0], [1], [2]]
    assert [p["run"]["num_forget"] for p in done] == [2, 2, 1]
    assert all("forget_indices" not in p["run"] for p in done)


def test_an_edited_log_is_not_imported(old, new):
    old.write_bytes(old.read_bytes().replace(b"ann", b"eve"))
    before = sorted(os.listdir(old.parent))
    with pytest.raises(ValueError, match="Line 2 breaks the chain"):
        import_log(old, new)
    assert sorted(os.listdir(old.parent)) == before


def test_nothing_is_replaced(old, new):
    new.write_text("mine")
    with pytest.raises(ValueError, match="new must not exist, got"):
        import_log(old, new)
    assert new.read_text() == "mine"
    new.unlink()
    Path(f"{new}.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="new must not exist, got"):
        import_log(old, new)
    assert not new.exists()


def test_an_import_that_was_killed_is_repeated(old, new):
    """The weights were copied; the log was not."""
    shutil.copy(f"{old}.safetensors", f"{new}.safetensors")
    import_log(old, new)
    assert verify(new).num_entries == 8


@pytest.mark.parametrize("length", [1, 8, 60, 10**4])
def test_a_line_cut_short_is_left_out_and_said(old, new, length):
    first = old.read_bytes().splitlines(keepends=True)[0]
    old.write_bytes(first + b'{"body":' + b"1" * length)
    with pytest.raises(
        ValueError,
        match="ends with a complete line, got .* bytes follow line 1.*import_log",
    ):
        verify_json_lines(old)
    *_, last = import_log(old, new).entries()
    assert last.payload["num_bytes_cut_off"] == 8 + length
    assert last.payload["num_entries"] == 1


BLOCKED = [
    ("request", {"id": "a", "indices": [1]}),
    ("request", {"id": None, "indices": [2]}),
    ("request", {"id": True, "indices": [2]}),
    ("request", {"id": [1], "indices": [2]}),
    ("request", {"id": "b", "indices": [2, 1]}),
    ("request", {"id": "a", "indices": [3]}),
    ("done", {"ids": ["z"], "weights_sha256": "0" * 64}),
    ("done", {"ids": ["a"]}),
    ("redaction", {"entry": 0}),
]


def test_entries_that_blocked_an_old_log_are_kept_as_refused(old, new):
    """An early release accepted requests that it could not carry out."""
    entries = [*BLOCKED, ("request", {"id": 1042, "indices": [4]}), ("note", {"x": 1})]
    old.write_text(chained(entries))
    imported = [*import_log(old, new).entries()]
    refused = [e.payload for e in imported if e.kind == "refused"]
    assert refused == [{"kind": k, "body": b} for k, b in BLOCKED[1:]]
    assert [e.kind for e in imported if e.kind != "refused"] == [
        *("request", "request", "note", "import")
    ]
    assert DeletionRequests(new, SIZE).pending == [
        DeletionRequest("a", (1,)),
        DeletionRequest("1042", (4,)),
    ]


def test_a_log_with_a_long_first_line(old, new):
    old.write_text(chained([("request", {"id": "a", "indices": [*range(200_000)]})]))
    assert old.stat().st_size > 1 << 20
    Path(f"{old}.safetensors").unlink()  # these belong to the log that was there
    import_log(old, new)
    assert len(requested_indices(new, 200_000)) == 200_000


def test_an_old_log_is_verified_as_before(old):
    lines = [json.loads(line) for line in old.read_text().splitlines()]
    heads = [line["hash"] for line in lines]
    assert verify_json_lines(old).head == heads[-1]
    added = [verify_json_lines(old, head).num_added for head in heads]
    assert added == [6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="the head of an empty log"):
        verify_json_lines(old, START)
    with pytest.raises(
        ValueError, match="must be the hash of one of the 7 entries, got ffff"
    ):
        verify_json_lines(old, "f" * 64)


@pytest.mark.parametrize("number", range(6))
def test_a_removed_or_doubled_or_swapped_line_is_noticed(old, number):
    lines = old.read_bytes().splitlines(keepends=True)
    removed = lines[:number] + lines[number + 1 :]
    doubled = lines[: number + 1] + lines[number:]
    swapped = list(lines)
    swapped[number], swapped[number + 1] = lines[number + 1], lines[number]
    for edited in (removed, doubled, swapped):
        old.write_bytes(b"".join(edited))
        with pytest.raises(ValueError, match="breaks the chain"):
            verify_json_lines(old)


def test_any_changed_byte_is_noticed(old):
    content = old.read_bytes()
    for position in range(0, len(content), 5):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        old.write_bytes(changed)
        with pytest.raises(ValueError, match=r"[Ll]ine|whole"):
            verify_json_lines(old)


@pytest.mark.parametrize("content", [b"buy milk", b"\0" * 40, b"one\ntwo\nthree"])
def test_a_file_of_something_else_is_refused(old, new, content):
    old.write_bytes(content)
    with pytest.raises(ValueError, match="of JSON lines, got .*Line 1 is not an entry"):
        import_log(old, new)
    assert not new.exists() and not Path(f"{new}.key").exists()


def test_a_new_log_is_not_imported(old, new):
    import_log(old, new)
    with pytest.raises(ValueError, match="of JSON lines, got .*Line 1 is not an entry"):
        import_log(new, f"{new}2")
    assert [*read_entries(new)]
