"""The chain notices every edit and survives every crash."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from opacus_pi.unlearning import deletion_record
from opacus_pi.unlearning.deletion_record import (
    START,
    DeletionRecord,
    added_since,
    verify,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deletions.jsonl"
    record = DeletionRecord(path)
    for i in range(4):
        record.append("request", {"id": f"r{i}", "indices": [i, i + 7]})
    return path


def test_entries_come_back_in_order(path):
    record = DeletionRecord(path)
    entries = record.entries()
    assert [e["number"] for e in entries] == [0, 1, 2, 3]
    assert [e["body"]["id"] for e in entries] == ["r0", "r1", "r2", "r3"]
    assert entries[0]["previous"] == START
    assert entries[-1]["hash"] == record.head == verify(path)


def test_an_empty_record(tmp_path):
    record = DeletionRecord(tmp_path / "new.jsonl")
    assert record.entries() == [] and record.head == START
    assert verify(tmp_path / "new.jsonl") == START
    assert os.stat(record.path).st_mode & 0o077 == 0  # nobody else's business


def test_any_changed_byte_is_noticed(path):
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"[Ll]ine|whole"):
            verify(path)


@pytest.mark.parametrize("number", range(3))
def test_a_removed_or_doubled_or_swapped_line_is_noticed(path, number):
    lines = path.read_bytes().splitlines(keepends=True)
    removed = lines[:number] + lines[number + 1 :]
    doubled = lines[: number + 1] + lines[number:]
    swapped = list(lines)
    swapped[number], swapped[number + 1] = lines[number + 1], lines[number]
    for edited in (removed, doubled, swapped):
        path.write_bytes(b"".join(edited))
        with pytest.raises(ValueError, match="breaks the chain"):
            verify(path)
        with pytest.raises(ValueError, match="breaks the chain"):
            DeletionRecord(path)


def test_a_line_rewritten_with_its_own_new_hash_is_noticed(path):
    lines = path.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["body"]["indices"] = [999]
    entry["hash"] = deletion_record._hash(entry)
    lines[1] = deletion_record._text(entry)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="Line 3 breaks the chain"):
        verify(path)


def test_missing_last_lines_need_the_head(path):
    head = DeletionRecord(path).head
    assert verify(path, head) == head
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    verify(path)  # a chain alone cannot know
    with pytest.raises(ValueError, match="missing at the end"):
        verify(path, head)


def test_an_earlier_head_is_found_and_what_came_since_is_counted(path):
    entries = DeletionRecord(path).entries()
    heads = [START, *(entry["hash"] for entry in entries)]
    assert [added_since(path, head) for head in heads] == [4, 3, 2, 1, 0]
    assert all(verify(path, head) == heads[-1] for head in heads)
    for check in (verify, added_since):
        with pytest.raises(ValueError, match="hash of one of the 4 entries"):
            check(path, "f" * 64)


@pytest.mark.parametrize("content", [b"buy milk", b"\0" * 40, b"one\ntwo\nthree"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match="deletion record, got .*notes. Line 1 is not an entry",
    ):
        DeletionRecord(path)
    assert path.read_bytes() == content


def test_a_first_write_cut_short_is_repaired(path):
    content = path.read_bytes()
    for length in (1, 8, 60):
        path.write_bytes(content[:length])
        assert [e["kind"] for e in DeletionRecord(path).entries()] == ["repaired"]


def test_a_write_cut_short_is_repaired_and_said(path):
    whole = path.read_bytes()
    start_of_last = whole[:-1].rfind(b"\n") + 1
    for cut in (start_of_last + 1, start_of_last + 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="got .* bytes after line 3"):
            verify(path)
        entries = DeletionRecord(path).entries()
        assert [e["kind"] for e in entries] == ["request"] * 3 + ["repaired"]
        assert entries[-1]["body"]["num_bytes"] == cut - start_of_last
        verify(path)


def test_a_failed_write_leaves_the_file_as_it_was(path, monkeypatch):
    before, record = path.read_bytes(), DeletionRecord(path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, text: write(file, text[:10]))
    with pytest.raises(OSError, match="10 of"):
        record.append("request", {"id": "r4"})
    assert path.read_bytes() == before


def test_what_is_no_json_is_refused_before_anything_is_written(path):
    before = path.read_bytes()
    for body in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((TypeError, ValueError)):
            DeletionRecord(path).append("request", body)
    assert path.read_bytes() == before


def test_writers_do_not_disturb_each_other(path):
    def write(name):
        record = DeletionRecord(path)
        for i in range(15):
            record.append("request", {"id": f"{name}{i}"})

    threads = [threading.Thread(target=write, args=(n,)) for n in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(DeletionRecord(path).entries()) == 4 + 45
    verify(path)


WRITER = """
import sys, types
for name in ("opacus_pi", "opacus_pi.unlearning"):  # without torch: starts quickly
    package = types.ModuleType(name)
    package.__path__ = [sys.argv[2] + "/" + name.replace(".", "/")]
    sys.modules[name] = package
from opacus_pi.unlearning.deletion_record import DeletionRecord
record = DeletionRecord(sys.argv[1])
for i in range(100000):
    record.append("request", {"id": i, "padding": "x" * 3000})
    print(i, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.08])
def test_nothing_acknowledged_is_lost_to_kill_9(tmp_path, delay):
    path = tmp_path / "deletions.jsonl"
    root = str(deletion_record.Path(deletion_record.__file__).parents[2])
    command = [sys.executable, "-c", WRITER, str(path), root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        acknowledged = [int(line) for line in child.stdout.read().splitlines()]
    entries = DeletionRecord(path).entries()
    written = [e["body"]["id"] for e in entries if e["kind"] == "request"]
    assert written == list(range(len(written)))
    assert len(written) >= max([0, *acknowledged]) + 1
    verify(path)


def test_the_verifying_command(path, capsys):
    head = verify(path)
    assert deletion_record._main([str(path), head]) == 0
    assert head in capsys.readouterr().out
    path.write_bytes(path.read_bytes().replace(b"r2", b"r9"))
    assert deletion_record._main([str(path)]) == 1
    assert "Line 3 breaks the chain" in capsys.readouterr().out
    assert deletion_record._main([str(path) + ".missing"]) == 1
