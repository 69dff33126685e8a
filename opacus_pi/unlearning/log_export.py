"""A deletion log for an auditor: the whole chain, and only the content that is shown.

The file is JSON. It has every entry with its time, kind and hashes, so that an auditor
sees how many requests there were and when each was carried out. What an entry says (who
asked, for which examples) is in the file only for the entries that are disclosed,
together with the salt that opens the commitment in the chain.

Some content is for the owner of the log alone and is never disclosed: the fingerprints
of the training set and of the examples that remain, because trying which examples to
add or to leave out tells which were forgotten, and the seed of a run, because with the
data that remain the noise and the updates of the run can be computed again. Entries of
earlier releases about a request or a run may have them; entries of this release are
about one thing each.

*Guarantee.* A file that ``verify_export`` accepts with a head that was noted elsewhere
has the entries of that log, and the disclosed content is what was entered.
*What breaks it:* without such a head, a log can be replaced as a whole. "Redacted" and
"withheld" are what the log's keeper says; the redaction itself is an entry, which can
be disclosed.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> log = DeletionLog(folder / "deletions.db")
>>> for name, indices in (("2026-001", [3]), ("2026-002", [5])):
...     _ = log.append("request", {"indices": indices}, name=name)
>>> export_log(log, folder / "for_auditor.json", disclose=[1])
>>> verify_export(folder / "for_auditor.json", log.head).num_entries
2
>>> [entry.payload for entry in exported_entries(folder / "for_auditor.json")]
[None, {'indices': [5]}]
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from opacus_pi._validate import expect
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.kinds import LOG_EXPORT
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.regular_file import require_regular
from opacus_pi.files.strict_json import json_text
from opacus_pi.unlearning.deletion_log import (
    START,
    DeletionLog,
    Entry,
    Verification,
    num_added_since,
)
from opacus_pi.unlearning.entry_hashes import commitment_of, entry_hash
from opacus_pi.unlearning.erased_data import REMAINING, TRAINING_SET

__all__ = ["export_log", "exported_entries", "is_for_owner_only", "verify_export"]

_HIDDEN = ("data_set", "remaining", "seed")  # in entries of earlier releases
_FACTS = ("number", "time", "kind", "commitment", "previous", "hash")
_MORE = ("state", "content")  # of an entry
_DISCLOSED, _WITHHELD, _REDACTED = "disclosed", "withheld", "redacted"


def export_log(
    log: DeletionLog, path: str | os.PathLike[str], *, disclose: Iterable[int] = ()
) -> None:
    """Write a log for an auditor, after verifying it.

    Args:
        log: The log.
        path: The JSON file; an existing file is replaced in one step.
        disclose: Numbers of the entries whose content the auditor may read. Default:
            none, and the file has no personal data but the times of requests.

    Raises:
        ValueError: If the log is broken, or an entry to disclose does not exist, was
            redacted, or is for the owner of the log only.
        OSError: If the file could not be written.
    """
    shown = {number: log.opening(number) for number in set(disclose)}
    entries = []
    for entry in log.entries():
        facts: dict[str, Any] = {name: getattr(entry, name) for name in _FACTS}
        if entry.number in shown:
            expect(
                not is_for_owner_only(entry),
                "disclose",
                entry.number,
                "must name entries that others may read",
                f"Entry {entry.number} has the fingerprint of the training set or of "
                "the examples that remain, or the seed of a run. Leave it out: its "
                "time and kind are in the file in any case.",
            )
            salt, name, body = shown[entry.number]
            facts["state"] = _DISCLOSED
            facts["content"] = {"salt": salt.hex(), "name": name, "body": body}
        else:
            facts["state"] = _REDACTED if entry.redacted else _WITHHELD
        entries.append(facts)
    content = {"kind": LOG_EXPORT.name, "version": LOG_EXPORT.version}
    text = json_text({**content, "entries": entries})
    replace_file(path, text.encode())


def is_for_owner_only(entry: Entry) -> bool:
    """Return whether nobody but the owner of the log may read what an entry says.

    Args:
        entry: An entry of the log.
    """
    payload = entry.payload or {}
    run = payload.get("run")
    names = {*payload, *(run if isinstance(run, dict) else ())}
    return entry.kind in (TRAINING_SET, REMAINING) or not names.isdisjoint(_HIDDEN)


def exported_entries(path: str | os.PathLike[str]) -> list[Entry]:
    """Read and verify the entries of a file that ``export_log`` wrote.

    Args:
        path: The file.

    Returns:
        The entries, oldest first; name and payload are None unless it was disclosed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the chain is broken, or disclosed content does not belong to its
            entry.
    """
    return [entry for entry, _ in _verified(Path(path))]


def verify_export(
    path: str | os.PathLike[str], head: str | None = None
) -> Verification:
    """Check a file that ``export_log`` wrote.

    Args:
        path: The file.
        head: The hash that an entry must have, noted elsewhere when it was the last;
            None checks the chain only.

    Returns:
        The head, the number of entries, and which of them are said to be redacted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``exported_entries``, or if no entry has the hash.
    """
    found = _verified(Path(path))
    hashes = [START, *(entry.hash for entry, _ in found)]
    return Verification(
        hashes[-1],
        len(found),
        num_added_since(head, hashes),
        tuple(entry.number for entry, state in found if state == _REDACTED),
    )


def _verified(path: Path) -> list[tuple[Entry, str]]:
    """Return the entries of a file with what it says about the content of each."""
    require_regular(path)
    try:
        content = plain_json(path.read_text(encoding="utf-8-sig"))
        named = content["kind"], content["version"]
        rows = [dict(row) for row in content["entries"]]
        more = sorted(content.keys() - {"kind", "version", "entries"})
    except (ValueError, TypeError, KeyError, RecursionError):
        named, rows, more = (None, None), [], []
    wanted = LOG_EXPORT.name, LOG_EXPORT.version
    expect(
        named == wanted,
        "path",
        path,
        f"must be a whole file of the kind {wanted[0]}, version {wanted[1]}",
        "Name a file that export_log wrote.",
    )
    expect(
        not more,
        "path",
        path,
        "must be an unedited export of a deletion log",
        f"It says more than a log: {', '.join(map(repr, more))[:200]}. Ask for a new "
        "file, written by export_log.",
    )
    previous, entries = START, []
    for number, row in enumerate(rows):
        try:
            entry, state = _entry(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            _refuse(path, number)
        if (entry.number, entry.previous) != (number, previous):
            _refuse(path, number)
        entries.append((entry, state))
        previous = entry.hash
    return entries


def _entry(row: Mapping[str, Any]) -> tuple[Entry, str]:
    """Return one entry and the state of its content, after checking both hashes.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: If something is wrong with it.
    """
    number, *texts = (row[name] for name in _FACTS)
    state, content = row["state"], row.get("content")
    good = type(number) is int and all(type(text) is str for text in texts)
    if not good or entry_hash(number, *texts[:-1]) != texts[-1]:
        raise ValueError("another hash")
    if state not in (_DISCLOSED, _WITHHELD, _REDACTED):
        raise ValueError("another state")
    if (content is not None) != (state == _DISCLOSED) or set(row) - {*_FACTS, *_MORE}:
        raise ValueError("a content that is not disclosed")
    if content is None:
        return Entry(number, *texts), state
    if set(content) != {"salt", "name", "body"}:
        raise ValueError("a content that says more")
    salt, name, body = bytes.fromhex(content["salt"]), content["name"], content["body"]
    if commitment_of(salt, name, body) != texts[2]:
        raise ValueError("another content")
    payload, plain = json.loads(body), None if name is None else json.loads(name)
    if type(payload) is not dict or type(plain) not in (str, type(None)):
        raise ValueError("a content that is no payload")
    return replace(Entry(number, *texts), name=plain, payload=payload), state


def _refuse(path: Path, number: int) -> NoReturn:
    """Raise because an entry is not what was entered."""
    raise ValueError(
        f"path must be an unedited export of a deletion log, got {path}. Entry "
        f"{number} breaks the chain, or its content was changed. Ask for a new file, "
        "written by export_log."
    )
