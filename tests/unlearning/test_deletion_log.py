"""The chain notices every edit, survives every crash, and outlives redaction."""

import errno
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from opacus_pi.unlearning import deletion_log
from opacus_pi.unlearning.deletion_log import (
    START,
    DeletionLog,
    append_within,
    read_entries,
    verify,
)
from opacus_pi.unlearning.entry_hashes import entry_hash
from opacus_pi.unlearning.log_export import export_log, verify_export
from opacus_pi.unlearning.requests import requested_indices


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deletions.db"
    log = DeletionLog(path)
    for i in range(4):
        log.append("request", {"indices": [i, i + 7]}, name=f"r{i}")
    return path


@contextmanager
def edited(path):
    """The database, to write to by other means."""
    with closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def test_entries_come_back_in_order(path):
    log = DeletionLog(path)
    entries = [*log.entries()]
    assert [e.number for e in entries] == [0, 1, 2, 3]
    assert [e.name for e in entries] == ["r0", "r1", "r2", "r3"]
    assert [e.payload for e in entries][2] == {"indices": [2, 9]}
    assert entries[0].previous == START
    assert entries[-1].hash == log.head == verify(path).head
    assert [*read_entries(path)] == entries
    assert log.find("r1") == entries[1] and log.find("r9") is None


def test_an_empty_log(tmp_path):
    log = DeletionLog(tmp_path / "new.db")
    assert [*log.entries()] == [] and log.head == START
    found = verify(tmp_path / "new.db", START)
    assert (found.head, found.num_entries, found.num_added) == (START, 0, 0)
    assert os.stat(log.path).st_mode & 0o077 == 0  # only the owner may read it
    assert os.listdir(tmp_path) == ["new.db"]


def test_an_entry_of_a_known_name_is_not_appended_again(path):
    log = DeletionLog(path)
    assert log.append("request", {"other": 1}, name="r2") == log.find("r2")
    assert len([*log.entries()]) == 4


# ------------------------------------------------------------------ edits


def test_any_changed_byte_is_noticed_or_changes_nothing(path):
    """Some bytes of a database mean nothing, such as the free space of a page."""
    content, wanted = path.read_bytes(), [*read_entries(path)]
    live = noticed = 0
    for position in range(0, len(content), 23):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        live += content[position] != 0
        try:
            verify(path)
            assert [*read_entries(path)] == wanted, position
        except ValueError:
            noticed += 1
    assert noticed > 0.8 * live


EDITS = {
    "time": "UPDATE entries SET time = '2020' WHERE number = 1",
    "kind": "UPDATE entries SET kind = 'note' WHERE number = 1",
    "number": "UPDATE entries SET number = 9 WHERE number = 1",
    "commitment": "UPDATE entries SET commitment = hash WHERE number = 1",
    "removed": "DELETE FROM entries WHERE number = 1",
    "removed wholly": "DELETE FROM entries WHERE number = 1; "
    "DELETE FROM payloads WHERE number = 1",
    "removed first": "DELETE FROM entries WHERE number = 0; "
    "DELETE FROM payloads WHERE number = 0",
    "payload": "UPDATE payloads SET body = '{\"indices\":[8]}' WHERE number = 1",
    "name": "UPDATE payloads SET name = '\"z\"' WHERE number = 1",
    "no name": "UPDATE payloads SET name = NULL WHERE number = 1",
    "salt": "UPDATE payloads SET salt = zeroblob(32) WHERE number = 1",
    "type": "UPDATE payloads SET salt = 'text', body = x'00' WHERE number = 1",
    "payload removed": "DELETE FROM payloads WHERE number = 1",
    "payload of no entry": "UPDATE payloads SET number = 9 WHERE number = 1",
    "one payload more": "INSERT INTO payloads VALUES (9, NULL, x'00', '{}')",
    "swapped": "UPDATE payloads SET number = -1 WHERE number = 1; "
    "UPDATE payloads SET number = 1 WHERE number = 2; "
    "UPDATE payloads SET number = 2 WHERE number = -1",
    "one table more": "CREATE TABLE more (a)",
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON entries BEGIN "
    "DELETE FROM payloads; END",
    "no table": "DROP TABLE payloads",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_noticed(path, edit):
    with edited(path) as connection:
        connection.executescript(EDITS[edit])
    with pytest.raises(
        ValueError, match="must be an unedited deletion log, got"
    ) as error:
        verify(path)
    assert "deletions.db" in str(error.value) and "\n" not in str(error.value)


def test_the_message_names_the_file_of_a_long_path(tmp_path):
    file = tmp_path / ("a long name of a folder, " * 5) / "requests of May.db"
    file.parent.mkdir()
    file.write_bytes(b"no log")
    with pytest.raises(ValueError, match="requests of May.db"):
        verify(file)


@pytest.mark.parametrize("edit", ["time", "removed", "payload", "payload removed"])
def test_readers_notice_an_edit_too(path, edit):
    with edited(path) as connection:
        connection.executescript(EDITS[edit])
    for entries in (DeletionLog(path).entries(), read_entries(path)):
        with pytest.raises(ValueError, match="[Ee]ntry 1"):
            list(entries)


LEFT_PAYLOADS = ["payload of no entry", "one payload more", "last removed"]


@pytest.mark.parametrize("edit", LEFT_PAYLOADS)
def test_a_log_whose_last_entries_were_removed_is_refused_everywhere(path, edit):
    """Not only by ``verify``: whoever reads it would take the rest for the whole."""
    log = DeletionLog(path)
    with edited(path) as connection:
        connection.executescript(
            EDITS.get(edit, "DELETE FROM entries WHERE number > 1")
        )
    for use in (
        lambda: verify(path),
        lambda: list(read_entries(path)),
        lambda: DeletionLog(path),
        lambda: list(log.entries()),
        lambda: log.head,
        lambda: log.find("r0"),
        lambda: log.opening(0),
        lambda: log.append("request", {"indices": [1]}, name="r9"),
        lambda: log.redact(0),
        lambda: requested_indices(path, 20),
        lambda: export_log(log, path.parent / "export.json"),
    ):
        with pytest.raises(ValueError, match="a payload that belongs to no entry"):
            use()
    assert not (path.parent / "export.json").exists()


def test_an_entry_rewritten_with_its_own_new_hash_is_noticed(path):
    entry = [*read_entries(path)][1]
    chained = entry_hash(1, "2020", entry.kind, entry.commitment, entry.previous)
    with edited(path) as connection:
        connection.execute(
            "UPDATE entries SET time = '2020', hash = ? WHERE number = 1", (chained,)
        )
    with pytest.raises(ValueError, match="Entry 2 breaks the chain"):
        verify(path)


def test_missing_last_entries_need_the_head(path):
    head = DeletionLog(path).head
    assert verify(path, head).head == head
    with edited(path) as connection:
        connection.executescript(
            "DELETE FROM entries WHERE number > 1;DELETE FROM payloads WHERE number > 1"
        )
    verify(path)  # a chain alone cannot know
    with pytest.raises(ValueError, match="entries are missing at the end"):
        verify(path, head)


def test_an_earlier_head_is_found_and_what_came_since_is_counted(path):
    heads = [entry.hash for entry in read_entries(path)]
    assert [verify(path, head).num_added for head in heads] == [3, 2, 1, 0]
    assert all(verify(path, head).head == heads[-1] for head in heads)
    assert verify(path).num_added is None
    with pytest.raises(
        ValueError, match="must be the hash of one of the 4 entries, got ffff"
    ):
        verify(path, "f" * 64)
    export_log(DeletionLog(path), path.with_suffix(".json"))
    for check, file in ((verify, path), (verify_export, path.with_suffix(".json"))):
        with pytest.raises(ValueError, match="the head of an empty log, with which ev"):
            check(file, START)


# ------------------------------------------------------------------ redaction


def test_redaction_removes_the_payload_and_keeps_the_chain(path):
    log = DeletionLog(path)
    log.append("note", {"text": "Zaphod lives here" * 500})  # on pages of its own
    head, before = log.head, [*log.entries()]
    assert b"Zaphod" in path.read_bytes()
    assert log.redact(4, "asked").payload == {"entry": 4, "reason": "asked"}
    assert log.redact(1).number == 6
    assert b"Zaphod" not in path.read_bytes() and b"[1,8]" not in path.read_bytes()
    found = verify(path, head)
    assert (found.redacted, found.num_added) == ((1, 4), 2)
    after = [*log.entries()]
    assert [e.number for e in after if e.redacted] == [1, 4]
    assert [e.hash for e in after[:5]] == [e.hash for e in before]
    assert after[4].commitment == before[4].commitment
    assert log.find("r1") is None


def test_redacting_again_changes_nothing(path):
    log = DeletionLog(path)
    log.redact(1)
    head = log.head
    assert log.redact(1).redacted and log.head == head


@pytest.mark.parametrize("number", [-1, 4, "a", None, 10**30])
def test_an_entry_that_is_not_there_is_not_redacted(path, number):
    with pytest.raises(ValueError, match="number must be the number of an entry, got"):
        DeletionLog(path).redact(number)
    assert verify(path).num_entries == 4


def test_a_redaction_is_not_redacted(path):
    log = DeletionLog(path)
    number = log.redact(1).number
    with pytest.raises(ValueError, match="must not be that of a redaction"):
        log.redact(number)


def test_a_commitment_does_not_tell_the_payload(path):
    """The same payload twice: the salts differ, and so do the commitments."""
    log = DeletionLog(path)
    first, second = (log.append("note", {"a": 1}) for _ in range(2))
    assert first.commitment != second.commitment


# ------------------------------------------------------------------ other files


@pytest.mark.parametrize("content", [b"buy milk", b"\0" * 40, b"one\ntwo\n" * 999])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    for read in (DeletionLog, verify):
        with pytest.raises(
            ValueError, match="path must be a deletion log, got .*Name a deletion"
        ):
            read(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["notes"]


def test_an_emptied_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "deletions.db"
    path.touch()
    for read in (DeletionLog, verify):
        with pytest.raises(
            ValueError, match="must be a deletion log, got .*The file is empty"
        ):
            read(path)
    assert path.read_bytes() == b""


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with edited(path) as connection:
        connection.execute("CREATE TABLE entries (a)")
    before = path.read_bytes()
    for read in (DeletionLog, verify):
        with pytest.raises(ValueError, match="It is an SQLite database of another"):
            read(path)
    assert path.read_bytes() == before


def test_a_log_of_a_newer_release_is_refused(path):
    with edited(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    for read in (DeletionLog, verify):
        with pytest.raises(
            ValueError, match="format version 1, got .*has version 2: .*release"
        ):
            read(path)


def test_a_log_of_json_lines_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "deletions.jsonl"
    shutil.copy(Path(__file__).parent / "json_lines" / "deletions.jsonl", path)
    before = path.read_bytes()
    for read in (DeletionLog, verify):
        with pytest.raises(ValueError, match=r"unlearning\.import_log\(old, new\)"):
            read(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_refused_and_left_alone(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    before = path.read_bytes()
    for read in (DeletionLog, verify):
        with pytest.raises(ValueError, match="must be a (whole )?deletion log, got"):
            read(path)
    assert path.read_bytes() == before


def test_what_cannot_be_opened_is_refused_with_the_cause(tmp_path, path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.db")
    with pytest.raises(FileNotFoundError):
        DeletionLog(tmp_path / "no folder" / "deletions.db")
    with pytest.raises(ValueError, match="a regular file, not a directory"):
        DeletionLog(tmp_path)
    with pytest.raises(NotADirectoryError):
        DeletionLog(path / "deletions.db")


# ------------------------------------------------------------------ crashes


def leave_unfinished_write(path):
    """Be killed in a process with changes on the disk that were not committed."""
    if (child := os.fork()) == 0:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA cache_size = 1")  # changes go to the file early
        rows = [(n, "x" * 2000, "", "", "", "") for n in range(10, 200)]
        connection.execute("DELETE FROM payloads")
        connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.path.exists(f"{path}-journal")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_unfinished_write_is_said_and_taken_back(path):
    leave_unfinished_write(path)
    with pytest.raises(
        ValueError, match="without an unfinished write, got .*DeletionLog"
    ):
        verify(path)
    assert len([*DeletionLog(path).entries()]) == 4
    assert verify(path).num_entries == 4


def test_a_full_disk_leaves_the_log_as_it_was(path):
    log, before = DeletionLog(path), path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            log.append("request", {"padding": "x" * 20000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno in (errno.ENOSPC, errno.EIO)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before and verify(path).num_entries == 4


def test_what_is_not_json_is_refused_before_anything_is_written(path):
    before = path.read_bytes()
    for payload in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((TypeError, ValueError)):
            DeletionLog(path).append("request", payload)
    assert path.read_bytes() == before


def test_a_log_that_another_process_holds_is_waited_for_then_said(path, monkeypatch):
    monkeypatch.setattr(deletion_log, "_SECONDS_TO_WAIT", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError, match="locked"):
            DeletionLog(path).append("request", {})
    DeletionLog(path).append("request", {})


def test_writers_do_not_disturb_each_other(path):
    def write(name):
        log = DeletionLog(path)
        for i in range(15):
            log.append("request", {}, name=f"{name}{i}")

    threads = [threading.Thread(target=write, args=(n,)) for n in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([*DeletionLog(path).entries()]) == 4 + 45
    verify(path)


WRITER = """
import sys, types
for name in ("opacus_pi", "opacus_pi.unlearning"):  # without torch: starts quickly
    package = types.ModuleType(name)
    package.__path__ = [sys.argv[2] + "/" + name.replace(".", "/")]
    sys.modules[name] = package
from opacus_pi.unlearning.deletion_log import DeletionLog
log = DeletionLog(sys.argv[1])
for i in range(100000):
    log.append("request", {"padding": "x" * 3000}, name=sys.argv[3] + str(i))
    print(i, flush=True)
"""


def writer(path, name="r"):
    """A process that appends without end and says what is on the disk."""
    root = str(Path(deletion_log.__file__).parents[2])
    command = [sys.executable, "-c", WRITER, str(path), root, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.08])
def test_nothing_acknowledged_is_lost_to_kill_9(tmp_path, delay):
    path = tmp_path / "deletions.db"
    with writer(path) as child:
        child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        acknowledged = [int(line) for line in child.stdout.read().splitlines()]
    names = [e.name for e in DeletionLog(path).entries()]
    assert names == [f"r{i}" for i in range(len(names))]
    assert len(names) >= max([0, *acknowledged]) + 1
    verify(path)


def test_processes_that_begin_a_log_at_once_share_it(tmp_path):
    path = tmp_path / "deletions.db"
    children = [writer(path, name) for name in "abc"]
    for child in children:
        for _ in range(5):
            child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    names = [e.name for e in DeletionLog(path).entries()]
    assert {n[0] for n in names} == {*"abc"} and len({*names}) == len(names) >= 15
    verify(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# ------------------------------------------------------------------ size


def test_reading_holds_some_entries_at_a_time(path, monkeypatch):
    monkeypatch.setattr(deletion_log, "_ENTRIES_AT_ONCE", 2)
    log = DeletionLog(path)
    log.redact(1)
    assert [e.number for e in log.entries()] == [0, 1, 2, 3, 4]
    assert verify(path).num_entries == 5
    reader = log.entries()
    next(reader)
    log.append("note", {})  # a reader that has not come to its end holds nothing
    assert [e.number for e in reader] == [1, 2, 3, 4, 5]


def test_an_append_does_not_depend_on_the_length_of_the_log(path, monkeypatch):
    """It reads the last entry, and by its name one more; never all of them."""
    log, checked = DeletionLog(path), []
    check = deletion_log._checked
    monkeypatch.setattr(
        deletion_log, "_checked", lambda *a: checked.append(1) or check(*a)
    )
    log.append("request", {}, name="new")
    log.append("request", {}, name="r0")
    assert len(checked) <= 3


# ------------------------------------------------------------------ checked first


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return {"x": value}


@pytest.mark.parametrize(
    ("kind", "payload", "name"),
    [
        ("note", [1, 2], None),
        ("note", "text", None),
        ("note", None, None),
        ("note", {1: 2}, None),
        ("note", {"x": float("nan")}, None),
        ("note", {"x": {1, 2}}, None),
        ("note", deep(101), None),
        ("note", deep(5000), None),
        ("", {}, None),
        (None, {}, None),
        ("x" * 101, {}, None),
        ("a\0b", {}, None),
        ("\x1b[31m", {}, None),
        ("\ud800", {}, None),
        ("redaction", {"entry": [0]}, None),
        ("redaction", {"entry": 0}, None),
        ("note", {}, 5),
        ("note", {}, b"x"),
        ("note", {}, "x" * 70_000),
    ],
)
def test_what_could_not_be_read_back_is_not_written(path, kind, payload, name):
    log, before = DeletionLog(path), path.read_bytes()
    with pytest.raises((TypeError, ValueError, RecursionError)):
        log.append(kind, payload, name=name)
    assert path.read_bytes() == before
    assert verify(path).num_entries == 4
    assert log.append("note", deep(90), name="\0\x1b \ud800").number == 4
    assert [entry.number for entry in log.entries()] == [0, 1, 2, 3, 4]


def test_a_reason_that_is_no_text_is_not_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="reason must be a string"):
        DeletionLog(path).redact(0, reason=5)
    assert path.read_bytes() == before


# ------------------------------------------------------------------ times


class Clock(datetime):
    """A clock that can be set."""

    hour_now = 12

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 1, 1, cls.hour_now, 30, 0, 500, tzinfo=tz)


def test_a_clock_that_goes_back_is_said_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(deletion_log, "datetime", Clock)
    log = DeletionLog(tmp_path / "log.db")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.append("note", {"x": 1})
        log.append("note", {"x": 2})  # within the same second: no warning
    monkeypatch.setattr(Clock, "hour_now", 9)
    with pytest.warns(UserWarning, match=r"09:30:00 UTC, which is before .* 12:30:00"):
        log.append("note", {"x": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.append("note", {"x": 4})  # not before its predecessor, which was said
    found = verify(log.path, log.head)
    assert found.num_entries == 4 and found.back_in_time == (2, 3)
    assert [entry.payload["x"] for entry in log.entries()] == [1, 2, 3, 4]


@pytest.mark.parametrize("time", ["", "yesterday", "2026-01-01T00:00:00"])
def test_a_text_that_is_no_time_is_listed(path, time):
    with deletion_log.writing(path) as connection:
        append_within(connection, path, "note", "{}", time=time)
    assert verify(path).back_in_time == (4,)
