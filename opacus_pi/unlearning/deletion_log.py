"""The deletion log: a tamper-evident list of requests and what was done about them.

Every entry stores the hash of the entry before it, so no entry can be changed, removed
or inserted without breaking that chain. The chain does not cover what an entry says
(its *payload*: who asked, for which examples) but a salted commitment to it. The
payload lies beside the chain in the same SQLite file and can be redacted later: the
commitment stays, and the chain still verifies.

*Guarantee.* An entry is on the disk when ``append`` returns. A process that is killed
leaves the log with the entry or without it, never with a part of it. Several processes
may append at once, and an append takes the same time however long the log is.

*What breaks it.* Anyone who can write to the file can remove the last entries, put an
old copy in its place, or write a whole new chain. The chain alone cannot show that:
note ``head`` where the log's keeper cannot write, and pass it to ``verify``.

>>> import tempfile
>>> log = DeletionLog(tempfile.mkdtemp() + "/deletions.db")
>>> entry = log.append("request", {"indices": [3, 5]}, name="2026-001")
>>> log.redact(entry.number).kind
'redaction'
>>> found = verify(log.path)
>>> found.head == log.head, found.num_entries, found.redacted
(True, 2, (0,))
"""

import errno
import json
import os
import secrets
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opacus_pi._validate import expect, require
from opacus_pi.files.atomic_file import put_new_file, restrict_to_owner
from opacus_pi.files.regular_file import require_regular
from opacus_pi.unlearning.entry_checks import (
    payload_text,
    require_kind,
    require_name,
)
from opacus_pi.unlearning.entry_hashes import commitment_of, entry_hash

__all__ = [
    "START",
    "DeletionLog",
    "Entry",
    "Verification",
    "read_entries",
    "verify",
]

START = "0" * 64  # what the first entry has in place of a hash before it
REDACTION = "redaction"

_APPLICATION = 0x6F706C67  # SQLite's application_id; the letters "oplg"
_FORMAT = 1
_TABLES = {
    "entries": "CREATE TABLE entries (number INTEGER PRIMARY KEY, time TEXT NOT NULL, "
    "kind TEXT NOT NULL, commitment TEXT NOT NULL, previous TEXT NOT NULL, "
    "hash TEXT NOT NULL)",
    "payloads": "CREATE TABLE payloads (number INTEGER PRIMARY KEY, name TEXT UNIQUE, "
    "salt BLOB NOT NULL, body TEXT NOT NULL)",
}
_COLUMNS = (
    "SELECT entries.number, time, kind, commitment, previous, hash, "
    "payloads.number, name, salt, body "
    "FROM entries LEFT JOIN payloads ON payloads.number = entries.number "
)
# Entries are numbered from 0 without a gap, so only a payload before the first or after
# the last one can belong to none. One statement sees one state of the file.
_HAS_MORE_PAYLOADS = (
    "SELECT coalesce((SELECT min(number) FROM payloads), 0) < 0 "
    "OR coalesce((SELECT max(number) FROM payloads), -1) "
    "> coalesce((SELECT max(number) FROM entries), -1)"
)
_EARLIEST = datetime.min.replace(tzinfo=timezone.utc)
_ENTRIES_AT_ONCE = 1000  # held in memory while a log is read
_SECONDS_TO_WAIT = 30.0  # for other processes that write
# What SQLite says where the place is at fault, not the content of the file.
_FAULTS_OF_THE_PLACE = {
    "is full": (errno.ENOSPC, "Free space on the disk, and call again"),
    "readonly database": (errno.EROFS, "Make the file and its directory writable"),
    "unable to open": (errno.EACCES, "Make the file and its directory accessible"),
    "disk I/O error": (
        errno.EIO,
        "See whether the disk is full, and call again",
    ),
    "is locked": (errno.ETIMEDOUT, "Call again when the other process has finished"),
}
_RESTORE = "Restore the file from a copy."
_SOMETHING_ELSE = "Name a deletion log; a new one needs a name that is free."


@dataclass(frozen=True)
class Entry:
    """One entry of a deletion log.

    Args:
        number: Position in the log, from 0.
        time: When it was appended, ISO 8601 in UTC.
        kind: What happened, such as ``"request"``.
        commitment: SHA-256 of salt, name and payload, hexadecimal.
        previous: Hash of the entry before; ``START`` for the first.
        hash: SHA-256 of the five fields above, hexadecimal.
        name: The entry's unique name within the log, or None.
        payload: What the entry says; None if it was redacted.
    """

    number: int
    time: str
    kind: str
    commitment: str
    previous: str
    hash: str
    name: str | None = None
    payload: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def redacted(self) -> bool:
        """Return whether the payload was removed."""
        return self.payload is None


@dataclass(frozen=True)
class Verification:
    """The result of ``verify`` for a log whose chain is unbroken.

    Args:
        head: Hash of the last entry; ``START`` for a log without entries.
        num_entries: Number of entries.
        num_added: Entries after the head that was passed; None if no head was passed.
        redacted: Numbers of the entries whose payload was redacted, increasing.
        back_in_time: Numbers of the entries whose time is before that of an earlier
            entry, or is no time at all, increasing. The chain orders entries by number;
            their times are those of the machine's clock.
    """

    head: str
    num_entries: int
    num_added: int | None = None
    redacted: tuple[int, ...] = ()
    back_in_time: tuple[int, ...] = ()


class DeletionLog:
    """A deletion log in one SQLite file, which only its owner can read.

    Opening checks that the file is a deletion log and that its last entry is intact.
    ``entries`` and ``verify`` check the whole log. Each call opens the file anew, so
    one object may be used by several threads and after a fork.

    Args:
        path: The file; made if it does not exist. It holds personal data: restrict
            access to it.

    Raises:
        ValueError: If the file is something else, damaged, or of a newer release.
        OSError: If it cannot be made or opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # A process may change its directory; the key and the weights are beside it.
        self.path = Path(os.path.abspath(path))
        if not os.path.lexists(self.path):
            put_new_file(self.path, write_new)
        with _connected(self.path, "rw") as connection:
            _last(connection, self.path)
        restrict_to_owner(self.path)

    @property
    def head(self) -> str:
        """Hash of the last entry; note it elsewhere to notice missing last entries."""
        last = self.last
        return last.hash if last else START

    @property
    def last(self) -> Entry | None:
        """The last entry, or None; of the chain, only this entry is verified."""
        with _connected(self.path, "rw") as connection:
            return _last(connection, self.path)

    def entries(self) -> Iterator[Entry]:
        """Read all entries, oldest first, each verified before it is returned.

        Raises:
            ValueError: If the chain is broken or the file is damaged. What is wrong
                with a later entry is found when the iteration gets there.
        """
        return _read(self.path, "rw")

    def find(self, name: str) -> Entry | None:
        """Return the entry that has a name, or None.

        Args:
            name: As passed to ``append``. The name of a redacted entry is not found.
        """
        with _connected(self.path, "rw") as connection:
            return _named(connection, self.path, name)

    def opening(self, number: int) -> tuple[bytes, str | None, str]:
        """Return the salt, name and payload that open the commitment of an entry.

        A person who has all three can check them against the chain; see
        ``commitment_of``.

        Args:
            number: Number of the entry.

        Returns:
            The salt, the name as JSON text or None, and the payload as JSON text.

        Raises:
            ValueError: If there is no such entry, or it was redacted.
        """
        with _connected(self.path, "rw") as connection:
            rows = connection.execute(
                "SELECT salt, name, body FROM payloads WHERE number = ?", (number,)
            ).fetchall()
        expect(
            len(rows) == 1,
            "number",
            number,
            "must be the number of an entry that was not redacted",
            "entries() lists the entries with their numbers.",
        )
        salt, name, body = rows[0]
        return salt, name, body

    def append(
        self, kind: str, payload: Mapping[str, Any], *, name: str | None = None
    ) -> Entry:
        """Append an entry; it is on the disk when this returns.

        The entry is checked before it is written: what is in the log can be read back.
        If the machine's clock is behind the last entry, a warning says so, and the
        entry gets the clock's time.

        Args:
            kind: What happened, a printable word; ``"redaction"`` is for ``redact``.
            payload: The facts, JSON-able.
            name: A name that no other entry has. If an entry has it already, nothing
                is appended, and that entry is returned.

        Returns:
            The new entry, or the one that has the name.

        Raises:
            TypeError: If the payload is not JSON-able; nothing was written.
            ValueError: If the payload has NaN or infinity or could not be read back, or
                kind or name is invalid (nothing was written); or if the log is damaged.
            OSError: If it could not be written; the log is as it was.
        """
        body = payload_text(payload)
        require_kind(kind)
        require(
            kind != REDACTION,
            f"kind {kind!r} is reserved for entries that redact others.",
            "Call redact, which also removes the payload.",
        )
        require_name(name)
        with writing(self.path) as connection:
            known = None if name is None else _named(connection, self.path, name)
            return known or append_within(connection, self.path, kind, body, name)

    def redact(self, number: int, reason: str = "") -> Entry:
        """Remove the payload of an entry for good; its commitment stays in the chain.

        The redaction is itself an entry. SQLite overwrites the payload with zeros.
        Copies that the file system or a backup still holds are not removed.

        Args:
            number: Number of the entry.
            reason: Why, to be stored with the redaction.

        Returns:
            The entry of the redaction. If the entry was redacted before: that entry,
            unchanged.

        Raises:
            ValueError: If there is no such entry, or it is a redaction.
            OSError: If it could not be written; the log is as it was.
        """
        expect(
            isinstance(reason, str),
            "reason",
            repr(reason),
            "must be a string",
            "Pass a text that says why the payload is removed.",
        )
        body = payload_text({"entry": number, "reason": reason})
        with writing(self.path) as connection:
            known = isinstance(number, int) and 0 <= number < 2**63
            rows = connection.execute(
                _COLUMNS + "WHERE entries.number = ?", (number if known else -1,)
            ).fetchall()
            expect(
                len(rows) == 1,
                "number",
                number,
                "must be the number of an entry",
                "entries() lists the entries with their numbers.",
            )
            entry = _checked(rows[0], self.path)
            expect(
                entry.kind != REDACTION,
                "number",
                number,
                "must not be that of a redaction",
                "Pass the number of another entry. A redaction contains only the "
                "number of the entry that was redacted.",
            )
            if entry.redacted:
                return entry
            connection.execute("DELETE FROM payloads WHERE number = ?", (number,))
            return append_within(connection, self.path, REDACTION, body)


def read_entries(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """Read the entries of a log without changing the file.

    Args:
        path: The file.

    Yields:
        The entries, oldest first, each verified.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``verify``.
    """
    return _read(Path(path), "ro")


def verify(path: str | os.PathLike[str], head: str | None = None) -> Verification:
    """Check a deletion log without changing the file.

    At most a thousand entries are held in memory at a time.

    Args:
        path: The file.
        head: The hash that an entry must have, noted elsewhere when it was the last;
            None checks the chain only, which cannot show that entries are missing at
            the end.

    Returns:
        The head, the number of entries, and which of them were redacted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an entry was changed, removed or inserted, a payload was changed
            or removed without a redaction, the file is damaged or something else, or
            no entry has the hash.
    """
    path = Path(path)
    with _connected(path, "ro") as connection:
        ((answer,),) = connection.execute("PRAGMA integrity_check(1)").fetchall()
    _require_whole(answer == "ok", path, answer)
    last, num_entries, place = START, 0, 0 if head == START else None
    redacted: list[int] = []
    back_in_time: list[int] = []
    latest = _EARLIEST
    for entry in _read(path, "ro"):
        time = _time_of(entry)
        if time is None or time < latest:
            back_in_time.append(entry.number)
        latest = max(latest, time or latest)
        last, num_entries = entry.hash, entry.number + 1
        if entry.hash == head:
            place = num_entries
        if entry.redacted:
            redacted.append(entry.number)
    found = Verification(last, num_entries, None, tuple(redacted), tuple(back_in_time))
    if head is None:
        return found
    require_head(head, num_entries, last, known=place is not None)
    return replace(found, num_added=num_entries - (place or 0))


def num_added_since(head: str | None, hashes: Sequence[str]) -> int | None:
    """Return how many entries follow a noted hash; None if no hash was noted.

    Args:
        head: The noted hash.
        hashes: ``START`` and those of all entries, oldest first.

    Raises:
        ValueError: If no entry has the hash.
    """
    if head is None:
        return None
    require_head(head, len(hashes) - 1, hashes[-1], known=head in hashes)
    return len(hashes) - 1 - hashes.index(head)


def require_head(head: str, num_entries: int, last: str, *, known: bool) -> None:
    """Refuse a log in which no entry has a hash that was noted elsewhere.

    Args:
        head: The noted hash.
        num_entries: Number of entries.
        last: Hash of the last one.
        known: Whether an entry has the noted hash.

    Raises:
        ValueError: If none has, or the hash is that of a log without entries.
    """
    expect(
        head != START or not num_entries,
        "head",
        head,
        "must be the hash of an entry",
        "This is the head of an empty log, with which every log agrees. Note the head "
        "again, now that there are entries.",
    )
    expect(
        known,
        "head",
        head,
        f"must be the hash of one of the {num_entries} entries",
        f"The last entry has the hash {last}. So entries are missing at the end, or "
        "this is another log. Open the log that this head belongs to, or restore the "
        "file from a copy.",
    )


def looks_like_a_log(start: bytes) -> bool:
    """Return whether a file begins like a deletion log, or like a damaged one.

    Args:
        start: At least the first 4096 bytes, one page of the database.
    """
    application = start[68:72]  # SQLite's file format, section 1.3.14
    return (
        application == _APPLICATION.to_bytes(4, "big")
        or _TABLES["payloads"].encode() in start[:4096]
    )


# ------------------------------------------------------------------ the file


def write_new(path: Path) -> None:
    """Turn an empty file into a log without entries."""
    with _opened(path, "rw") as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
        for statement in _TABLES.values():
            connection.execute(statement)
        connection.execute("COMMIT")


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Context with exclusive write access; an error rolls everything back.

    Args:
        path: The log. Other processes that want to write wait until the context ends,
            for half a minute at most.
    """
    with _connected(path, "rw") as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection  # closing without COMMIT rolls back
        connection.execute("COMMIT")


@contextmanager
def _connected(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Context of a connection to a deletion log, after checking its format."""
    expect(
        os.stat(path).st_size > 0,
        "path",
        path,
        "must be a deletion log",
        "The file is empty, but a log never is. Restore it from a copy, or delete the "
        "file to begin a new log.",
    )
    with _opened(path, mode) as connection:
        ((application,),) = connection.execute("PRAGMA application_id").fetchall()
        expect(
            application == _APPLICATION,
            "path",
            path,
            "must be a deletion log",
            f"It is an SQLite database of another program. {_SOMETHING_ELSE}",
        )
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        expect(
            version == _FORMAT,
            "path",
            path,
            f"must be a deletion log in format version {_FORMAT}",
            f"It has version {version}: read it with the release of opacus_pi that "
            "wrote it.",
        )
        pages = connection.execute(
            "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        ).fetchone()
        complete = os.stat(path).st_size >= pages[0]  # looked at last: it may grow
        _require_whole(complete, path, "its end is missing")
        found = dict(
            connection.execute(
                "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"
            ).fetchall()
        )
        # Any other table, view or trigger could make a statement do something else.
        _require_unedited(
            found == _TABLES,
            path,
            "It has other tables or triggers than a deletion log.",
        )
        ((has_more,),) = connection.execute(_HAS_MORE_PAYLOADS).fetchall()
        _require_unedited(
            not has_more,
            path,
            "It contains a payload that belongs to no entry: entries were removed, or "
            "a payload was added.",
        )
        yield connection


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Context of a connection to an existing file; SQLite's errors become ours.

    The file is never opened by other means while this process may have a connection to
    it: closing a file drops all locks that a process holds on it.
    """
    require_regular(path)
    place = f"file:{quote(os.path.abspath(path))}?mode={mode}"
    try:
        with closing(
            sqlite3.connect(
                place, uri=True, timeout=_SECONDS_TO_WAIT, isolation_level=None
            )
        ) as connection:
            for setting in (
                "synchronous = EXTRA",  # a commit is on the disk, its directory too
                "secure_delete = ON",  # redacted payloads are overwritten
                "cell_size_check = ON",
                "trusted_schema = OFF",
            ):
                connection.execute(f"PRAGMA {setting}")
            yield connection
    except sqlite3.Error as error:
        _raise_ours(error, path, mode)


def _raise_ours(error: sqlite3.Error, path: Path, mode: str) -> None:
    """Raise what an error of SQLite means for a deletion log.

    A full disk, a lock or a missing permission is an ``OSError``: the file may be good.
    All other errors concern its content, and become a ``ValueError``.

    Args:
        error: What SQLite raised.
        path: The log.
        mode: ``"ro"`` if the file was opened for reading only, else ``"rw"``.
    """
    said = str(error)
    if mode == "ro" and ("readonly" in said or "unable to open" in said):
        expect(
            not os.path.exists(f"{path}-journal"),
            "path",
            path,
            "must be a deletion log without an unfinished write",
            "A process was killed while it wrote. The next 'opacus-pi unlearn --log', "
            "or DeletionLog(path), removes the unfinished part.",
        )
        # The file itself can be read, so its header asks for a write-ahead log. Our
        # files never have one: the header is damaged.
        is_readable = path.is_file() and os.access(path, os.R_OK)
        _require_whole(not is_readable, path, said)
    for words, (number, remedy) in _FAULTS_OF_THE_PLACE.items():
        if words in said:
            what = f"{os.strerror(number)} ({said}). {remedy}; the log is as it was"
            raise OSError(number, what, str(path))
    if "not a database" in said:
        with path.open("rb") as file:
            lines = file.read(8) == b'{"body":'
        remedy = (
            "It is a log of JSON lines, which earlier releases wrote. Import it into a "
            "new file: opacus_pi.unlearning.import_log(old, new)."
        )
        expect(
            False,
            "path",
            path,
            "must be an SQLite deletion log" if lines else "must be a deletion log",
            remedy if lines else _SOMETHING_ELSE,
        )
    _require_whole(False, path, said)


def _require_whole(condition: bool, path: Path, damage: str) -> None:
    """Refuse a damaged file."""
    remedy = f"It is damaged ({damage}). {_RESTORE}"
    expect(condition, "path", path, "must be a whole deletion log", remedy)


def _require_unedited(condition: bool, path: Path, finding: str) -> None:
    """Refuse a file that was changed by other means."""
    remedy = f"{finding} {_RESTORE}"
    expect(condition, "path", path, "must be an unedited deletion log", remedy)


# ------------------------------------------------------------------ entries


def append_within(
    connection: sqlite3.Connection,
    path: Path,
    kind: str,
    body: str,
    name: str | None = None,
    time: str | None = None,
) -> Entry:
    """Append an entry in an open transaction.

    Args:
        connection: Of ``writing``.
        path: The log, for messages.
        kind: What happened.
        body: The payload as JSON text.
        name: The entry's unique name, or None.
        time: ISO 8601; default now.
    """
    last = _last(connection, path)
    number, previous = (last.number + 1, last.hash) if last else (0, START)
    if time is None:
        now = datetime.now(timezone.utc)
        time = now.isoformat(timespec="seconds")
        _warn_if_back_in_time(now, last, path)
    salt = secrets.token_bytes(32)
    commitment = commitment_of(salt, _name_text(name), body)
    chained = entry_hash(number, time, kind, commitment, previous)
    connection.execute(
        "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)",
        (number, time, kind, commitment, previous, chained),
    )
    connection.execute(
        "INSERT INTO payloads VALUES (?, ?, ?, ?)",
        (number, _name_text(name), salt, body),
    )
    payload = json.loads(body)
    return Entry(number, time, kind, commitment, previous, chained, name, payload)


def _read(path: Path, mode: str) -> Iterator[Entry]:
    """Yield verified entries in parts, so that a long read blocks no writer.

    Between two parts another process may append; the new entries are read as well. A
    payload may be missing only if a later entry says that it was redacted, so this is
    decided after the last entry.
    """
    previous, missing = START, set[int]()
    number = 0
    while True:
        with _connected(path, mode) as connection:
            rows = connection.execute(
                _COLUMNS + "WHERE entries.number >= ? ORDER BY entries.number LIMIT ?",
                (number, _ENTRIES_AT_ONCE),
            ).fetchall()
        for row in rows:
            entry = _checked(row, path)
            follows = (entry.number, entry.previous) == (number, previous)
            _require_unedited(follows, path, f"Entry {number} breaks the chain.")
            if entry.redacted:
                missing.add(number)
            elif entry.kind == REDACTION:
                removed = (entry.payload or {}).get("entry", -1)
                if isinstance(removed, int):
                    missing.discard(removed)
            yield entry
            number, previous = number + 1, entry.hash
        if len(rows) < _ENTRIES_AT_ONCE:
            break
    _require_unedited(
        not missing,
        path,
        f"The payload of entry {min(missing, default=0)} was removed, and no entry "
        "says that it was redacted.",
    )


def _last(connection: sqlite3.Connection, path: Path) -> Entry | None:
    """Return the last entry after checking it, or None."""
    row = connection.execute(
        _COLUMNS + "ORDER BY entries.number DESC LIMIT 1"
    ).fetchone()
    return None if row is None else _checked(row, path)


def _named(connection: sqlite3.Connection, path: Path, name: str) -> Entry | None:
    """Return the entry of a name after checking it, or None."""
    row = connection.execute(
        _COLUMNS + "WHERE payloads.name = ?", (_name_text(name),)
    ).fetchone()
    return None if row is None else _checked(row, path)


def _checked(row: tuple[Any, ...], path: Path) -> Entry:
    """Return an entry from the tables, after checking its hash and its payload."""
    number, *texts = row[:6]
    payload_number, name, salt, body = row[6:]
    good = type(number) is int and all(type(text) is str for text in texts)
    good = good and entry_hash(number, *texts[:-1]) == texts[-1]
    _require_unedited(good, path, f"Entry {number} breaks the chain.")
    entry = Entry(number, *texts)
    if payload_number is None:
        return entry
    good = type(salt) is bytes and type(body) is str and type(name) in (str, type(None))
    good = good and commitment_of(salt, name, body) == entry.commitment
    _require_unedited(good, path, f"The payload of entry {number} was changed.")
    return _with_payload(entry, name, body, path)


def _with_payload(entry: Entry, name: str | None, body: str, path: Path) -> Entry:
    """Return an entry with its name and its payload, both read from their JSON."""
    try:
        payload = json.loads(body)
        plain_name = None if name is None else json.loads(name)
    except (ValueError, RecursionError):
        payload = plain_name = None
    good = type(payload) is dict and (name is None or type(plain_name) is str)
    _require_unedited(
        good, path, f"The payload of entry {entry.number} is not a JSON object."
    )
    return replace(entry, name=plain_name, payload=payload)


def _name_text(name: str | None) -> str | None:
    """Return a name as it is stored: as JSON.

    SQLite stores text as UTF-8, and Python refuses to encode a string with a lone
    surrogate, which names of files may contain. JSON escapes such characters.
    """
    return None if name is None else json.dumps(name)


# ------------------------------------------------------------------ times


def _time_of(entry: Entry) -> datetime | None:
    """Return the time of an entry, or None if its text is not a time with a zone."""
    try:
        time = datetime.fromisoformat(entry.time)
    except ValueError:
        return None
    return None if time.tzinfo is None else time


def _warn_if_back_in_time(now: datetime, last: Entry | None, path: Path) -> None:
    """Warn if the clock is behind the last entry by more than its rounding."""
    before = None if last is None else _time_of(last)
    if before is not None and now < before:
        warnings.warn(
            f"{path}: the clock of this machine says {now:%Y-%m-%d %H:%M:%S} UTC, "
            f"which is before the last entry, {before:%Y-%m-%d %H:%M:%S}. The new "
            "entry keeps its place in the chain, and verify lists it. Set the clock "
            "right.",
            stacklevel=4,
        )
