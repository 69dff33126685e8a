"""An append-only file of what was asked and done: JSON lines, chained by hashes.

Each line holds the hash of the line before, so that no line can be changed, removed
or put in between without breaking the chain. A chain alone cannot show that its *last*
lines were cut off: keep ``head`` elsewhere and pass it to ``verify``.

From a shell: ``python -m opacus_pi.unlearning.deletion_record FILE [HEAD]``.

>>> import tempfile
>>> path = tempfile.mkdtemp() + "/deletions.jsonl"
>>> record = DeletionRecord(path)
>>> _ = record.append("request", {"id": "a", "indices": [3, 5]})
>>> verify(path) == record.head
True
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opacus_pi._validate import expect

__all__ = ["DeletionRecord", "added_since", "read_entries", "verify"]

START = "0" * 64
_OPENING = b'{"body":'  # of every line
_REMEDY = "Name a deletion record or a new file; restore a damaged one from a copy."
_FIELDS = {
    "number": int,
    "time": str,
    "kind": str,
    "body": dict,
    "previous": str,
    "hash": str,
}


class DeletionRecord:
    """One file of chained entries; safe against crashes and concurrent writers.

    Opening verifies the whole file. A last line that a crash cut short was never
    acknowledged: it is removed and the removal itself recorded (kind ``"repaired"``).

    Args:
        path: The file; made if missing. It names people's data: guard it.

    Raises:
        ValueError: If any line was edited, or the file holds something else: what is
            not the beginning of an entry is never taken for a write cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._locked() as file:
            self._repair(file)

    @property
    def head(self) -> str:
        """Hash of the last entry; keep it elsewhere to notice a cut-off end."""
        entries = self.entries()
        return entries[-1]["hash"] if entries else START

    def entries(self) -> list[dict[str, Any]]:
        """All entries, verified.

        Raises:
            ValueError: If any line was edited.
        """
        return read_entries(self.path)

    def append(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Add an entry; it is on the disk when this returns.

        Args:
            kind: What happened.
            body: The facts, JSON-able.

        Returns:
            The entry as written.
        """
        return self.append_unless(lambda entries: None, kind, body)

    def append_unless(
        self, found: Any, kind: str, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Add an entry unless the file already answers, with no writer in between.

        Args:
            found: ``entries -> entry or None``; an entry is returned instead of adding.
            kind: What happened.
            body: The facts, JSON-able.

        Returns:
            The entry that was found, or the one as written.
        """
        with self._locked() as file:
            entries = self._repair(file)
            return found(entries) or self._write(file, entries, kind, body)

    def _write(
        self, file: int, entries: list[dict[str, Any]], kind: str, body: Any
    ) -> dict[str, Any]:
        """Chain and store one entry in one write."""
        entry = {
            "number": len(entries),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "kind": kind,
            "body": json.loads(json.dumps(body, allow_nan=False)),
            "previous": entries[-1]["hash"] if entries else START,
        }
        entry["hash"] = _hash(entry)
        line = _text(entry).encode() + b"\n"
        written = os.write(file, line)
        if written != len(line):  # disk full: take the part back
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes written")
        os.fsync(file)
        return entry

    def _repair(self, file: int) -> list[dict[str, Any]]:
        """The verified entries; a part of one at the end is removed and recorded."""
        content = self.path.read_bytes()
        entries, rest = _parsed(content, self.path)
        if rest:
            os.ftruncate(file, len(content) - len(rest))
            os.fsync(file)
            lost = {"num_bytes": len(rest), "sha256": hashlib.sha256(rest).hexdigest()}
            entries.append(self._write(file, entries, "repaired", lost))
        return entries

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file, with no other writer."""
        new = not self.path.exists()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if new:
                sync_directory(self.path.parent)
            yield file
        finally:
            os.close(file)


def read_entries(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All entries of a deletion record, verified; the file is not changed.

    Args:
        path: The file. What a crash cut short at its end is left out.

    Returns:
        The entries, oldest first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If any line was edited, or the file holds something else.
    """
    return _parsed(_settled(Path(path)), path)[0]


def verify(path: str | os.PathLike[str], head: str | None = None) -> str:
    """Check a deletion record without changing it.

    Args:
        path: The file.
        head: The hash that an entry must have, kept elsewhere when it was the last;
            None checks the chain only, which cannot notice that whole lines are
            missing at the end.

    Returns:
        The hash of the last entry.

    Raises:
        ValueError: If a line was edited, removed, put in between or cut short, or no
            entry has the hash.
    """
    hashes = _hashes(path, head)
    return hashes[-1]


def added_since(path: str | os.PathLike[str], head: str) -> int:
    """How many entries were added after one, in a record that is whole.

    Args:
        path: The file.
        head: The hash that an entry must have, kept elsewhere when it was the last.

    Returns:
        Number of entries after it.

    Raises:
        ValueError: As ``verify``.
    """
    hashes = _hashes(path, head)
    return len(hashes) - 1 - hashes.index(head)


def _hashes(path: str | os.PathLike[str], head: str | None) -> list[str]:
    """The verified chain: what the first line links to, and each line's hash."""
    entries, rest = _parsed(_settled(Path(path)), path)
    expect(
        not rest,
        "path",
        f"{len(rest)} bytes after line {len(entries)} of {path}",
        "must end with a whole line",
        "A crash cut a write short; the next 'opacus-pi unlearn --record' repairs it, "
        "as does DeletionRecord(path).",
    )
    hashes = [START, *(entry["hash"] for entry in entries)]
    expect(
        head is None or head in hashes,
        "head",
        head,
        f"must be the hash of one of the {len(entries)} entries",
        f"The last entry has {hashes[-1]}. Entries are missing at the end, "
        "or this is another record.",
    )
    return hashes


def _settled(path: Path) -> bytes:
    """The content of a file that nobody is writing to at the moment."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return file.read()


def _parsed(content: bytes, path: Any) -> tuple[list[dict[str, Any]], bytes]:
    """The verified entries, and what stands after the last whole line."""
    end = content.rfind(b"\n") + 1
    entries, rest = _verified(content[:end], path), content[end:]
    expect(
        bool(entries) or _opens(rest),
        "path",
        path,
        "must be a deletion record",
        f"Line 1 is not an entry. {_REMEDY}",
    )
    return entries, rest


def _verified(whole: bytes, path: Any) -> list[dict[str, Any]]:
    """The entries of whole lines, each checked against its hash and the one before."""
    entries: list[dict[str, Any]] = []
    previous = START
    for number, line in enumerate(whole.split(b"\n")[:-1]):
        entry = _entry_of(line, number, previous)
        expect(
            bool(entry),
            "path",
            path,
            "must be an unedited deletion record",
            f"Line {number + 1} breaks the chain of hashes. {_REMEDY}"
            if number or line.startswith(_OPENING)
            else f"Line 1 is not an entry. {_REMEDY}",
        )
        entries.append(entry)
        previous = entry["hash"]
    return entries


def _opens(line: bytes) -> bool:
    """Whether bytes begin as an entry does, however few they are."""
    return line[: len(_OPENING)] == _OPENING[: len(line)]


def _entry_of(line: bytes, number: int, previous: str) -> dict[str, Any]:
    """A line as an entry of this number after that hash; empty if it is none."""
    try:
        entry: dict[str, Any] = json.loads(line)
        good = (
            set(entry) == set(_FIELDS)
            and all(type(entry[name]) is kind for name, kind in _FIELDS.items())
            and entry["number"] == number
            and entry["previous"] == previous
            and entry["hash"] == _hash(entry)
            and _text(entry).encode() == line
        )
    except (ValueError, TypeError, RecursionError):
        return {}
    return entry if good else {}


def _hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of everything in an entry but its hash."""
    content = {k: v for k, v in entry.items() if k != "hash"}
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(value: Mapping[str, Any]) -> str:
    """The one way to write an entry."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, after a file was made or renamed."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _main(arguments: list[str]) -> int:
    """Verify a file from the command line."""
    try:
        head = verify(*arguments)
    except (OSError, TypeError, ValueError) as error:
        print(f"NOT VERIFIED: {error}")
        return 1
    print(f"verified, head {head}")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
