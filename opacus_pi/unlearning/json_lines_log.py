"""Deletion logs of JSON lines, which earlier releases wrote: verified and imported.

Each line of such a log is an entry that holds the hash of the line before. The old file
is only read. ``import_log`` writes everything in it to a new SQLite log, with the old
numbers and times, and appends an entry that names the old file and its head. Entries
that ``DeletionRequests`` could not carry out (an early release accepted such requests)
are kept under the kind ``"refused"``, so that they no longer block the others.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opacus_pi._validate import expect
from opacus_pi.files.atomic_file import put_new_file
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.regular_file import require_regular
from opacus_pi.unlearning.deletion_log import (
    START,
    DeletionLog,
    Verification,
    append_within,
    num_added_since,
    write_new,
    writing,
)
from opacus_pi.unlearning.entry_checks import payload_text, plain_name
from opacus_pi.unlearning.erased_data import WITHDRAWAL
from opacus_pi.unlearning.honouring_weights import weights_path_of
from opacus_pi.unlearning.logged_runs import to_be_logged
from opacus_pi.unlearning.user_names import UserNames

__all__ = ["import_log", "verify_json_lines"]

FIRST_BYTES = b'{"body":'  # of every line
_FIELDS = {
    "number": int,
    "time": str,
    "kind": str,
    "body": dict,
    "previous": str,
    "hash": str,
}
_REFUSED = "refused"
_KINDS_OF_REQUESTS = ("request", "done")
_OWN_KINDS = ("redaction", WITHDRAWAL, _REFUSED)


def import_log(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    key: bytes | None = None,
    store_names: bool = False,
) -> DeletionLog:
    """Write an old log to a new file, with the weights beside it; the old one stays.

    A last line that a crash cut short was never acknowledged and is left out.

    Args:
        old: The log of JSON lines. Its chain is verified first.
        new: The new log, which must not exist.
        key: As in ``DeletionRequests``.
        store_names: Whether to store users' names themselves; else their keyed hashes.

    Returns:
        The new log.

    Raises:
        FileNotFoundError: If there is no old log.
        ValueError: If the old log was edited or is something else, or there is a file
            under the new name.
        OSError: If the new log could not be written.
    """
    old, new = Path(old), Path(new)
    entries, rest = _parsed(_settled(old), old)
    for path in (new, weights_path_of(new)):
        same = path != new and _same_content(path, weights_path_of(old))
        expect(
            same or not os.path.lexists(path),
            "new",
            path,
            "must not exist",
            "Import into a new file: an existing file is never replaced.",
        )
    names = UserNames(new, key, store_names)

    def write(hidden: Path) -> None:
        write_new(hidden)
        with writing(hidden) as connection:
            for time, kind, payload, name in _converted(entries, names):
                text = payload_text(payload)
                append_within(connection, hidden, kind, text, name, time)
            facts = {
                "file": old.name,
                "num_entries": len(entries),
                "head": entries[-1]["hash"] if entries else START,
                "num_bytes_cut_off": len(rest),
            }
            append_within(connection, hidden, "import", payload_text(facts))

    if weights_path_of(old).exists():
        put_new_file(
            weights_path_of(new),
            lambda hidden: _copy(weights_path_of(old), hidden),
        )
    put = put_new_file(new, write)
    expect(
        put,
        "new",
        new,
        "must not exist",
        ("Another process has just created it. Import into another new file."),
    )
    return DeletionLog(new)


def verify_json_lines(
    path: str | os.PathLike[str], head: str | None = None
) -> Verification:
    """Check a log of JSON lines without changing it.

    Args:
        path: The file.
        head: The hash that an entry must have, noted elsewhere when it was the last;
            None checks the chain only.

    Returns:
        The head and the number of entries.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line was edited, removed, inserted or cut short, or no entry
            has the hash.
    """
    entries, rest = _parsed(_settled(Path(path)), path)
    expect(
        not rest,
        "path",
        path,
        "must be a deletion log that ends with a complete line",
        f"{len(rest)} bytes follow line {len(entries)}: a crash interrupted the last "
        "write. opacus_pi.unlearning.import_log(old, new) imports the complete lines.",
    )
    hashes = [START, *(entry["hash"] for entry in entries)]
    return Verification(hashes[-1], len(entries), num_added_since(head, hashes))


# ------------------------------------------------------------------ conversion


def _converted(
    entries: list[dict[str, Any]], names: UserNames
) -> Iterator[tuple[str, str, dict[str, Any], str | None]]:
    """Yield time, kind, payload and name of each entry for the new log."""
    numbers: dict[str, int] = {}  # of the requests, by their names
    still_open: set[str] = set()
    for entry in entries:
        kind, body, name = entry["kind"], _with_hashed_user(entry["body"], names), None
        if kind == "request" and _is_request(body, numbers):
            name = plain_name("request_id", body.pop("id"))
            numbers[name] = entry["number"]
            still_open.add(name)
        elif kind == "done" and _is_done(body, still_open):
            ids = body.pop("ids")
            still_open -= set(ids)
            body["requests"] = [numbers[one] for one in ids]
            if isinstance(body.get("run"), dict):
                body["run"] = to_be_logged(body["run"])
        elif kind in (*_KINDS_OF_REQUESTS, *_OWN_KINDS):
            kind, body = _REFUSED, {"kind": kind, "body": body}
        yield entry["time"], kind, body, name


def _is_request(body: Mapping[str, Any], known: Mapping[str, int]) -> bool:
    """Return whether ``DeletionRequests`` can carry out what an entry asks for."""
    rows = body.get("indices")
    try:
        name = plain_name("request_id", body.get("id"))
    except ValueError:
        return False
    return (
        name not in known
        and isinstance(rows, list)
        and all(type(row) is int and row >= 0 for row in rows)
        and len(rows) > 0
        and rows == sorted(set(rows))
    )


def _is_done(body: Mapping[str, Any], still_open: set[str]) -> bool:
    """Return whether an entry says that requests which were open were carried out."""
    ids, digest = body.get("ids"), body.get("weights_sha256")
    listed = isinstance(ids, list) and all(isinstance(one, str) for one in ids)
    return listed and set(ids or ()) <= still_open and isinstance(digest, str)


def _with_hashed_user(body: Mapping[str, Any], names: UserNames) -> dict[str, Any]:
    """Return a payload with the user's name in the form of the new log."""
    if not isinstance(body.get("user"), str):
        return dict(body)
    rest = {name: value for name, value in body.items() if name != "user"}
    return {**rest, **names.facts(body["user"])}


def _same_content(path: Path, other: Path) -> bool:
    """Return whether two files exist and hold the same bytes."""
    if not (path.exists() and other.exists()):
        return False
    return path.read_bytes() == other.read_bytes()


def _copy(source: Path, target: Path) -> None:
    """Copy a file and flush it to the disk."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


# ------------------------------------------------------------------ the old format


def _settled(path: Path) -> bytes:
    """Return the content of a file, once no process writes to it."""
    require_regular(path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return file.read()


def _parsed(content: bytes, path: Any) -> tuple[list[dict[str, Any]], bytes]:
    """Return the verified entries, and the bytes after the last whole line."""
    end = content.rfind(b"\n") + 1
    entries, rest = _verified(content[:end], path), content[end:]
    begins = rest[: len(FIRST_BYTES)] == FIRST_BYTES[: len(rest)]
    _require(bool(entries) or begins, path, foreign=True)
    return entries, rest


def _verified(whole: bytes, path: Any) -> list[dict[str, Any]]:
    """Return the entries of whole lines, after checking the chain of hashes."""
    entries: list[dict[str, Any]] = []
    previous = START
    for number, line in enumerate(whole.split(b"\n")[:-1]):
        entry = _entry_of(line, number, previous)
        foreign = number == 0 and not line.startswith(FIRST_BYTES)
        _require(bool(entry), path, foreign=foreign, number=number)
        entries.append(entry)
        previous = entry["hash"]
    return entries


def _require(condition: bool, path: Any, *, foreign: bool, number: int = 0) -> None:
    """Refuse a file: it is something else, or the line of a number was edited."""
    expect(
        condition,
        "path",
        path,
        "must be a deletion log of JSON lines"
        if foreign
        else "must be an unedited deletion log",
        "Line 1 is not an entry. Name a log that an earlier release wrote."
        if foreign
        else f"Line {number + 1} breaks the chain. Restore the file from a copy.",
    )


def _entry_of(line: bytes, number: int, previous: str) -> dict[str, Any]:
    """Return the entry in a line; empty unless its number and hashes are right."""
    try:
        entry: dict[str, Any] = plain_json(line)
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
    """Return the SHA-256 of an entry without its hash."""
    content = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(value: Mapping[str, Any]) -> str:
    """Return the canonical text of an entry, as earlier versions wrote it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
