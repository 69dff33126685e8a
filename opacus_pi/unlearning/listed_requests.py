"""The requests of a deletion log in one list: what is pending, and what was done when.

Nothing is written: the list can be made by someone who may only read the log. It is of
a verified log, and of all of its requests, as far as the weights beside the log show
that: if they honour a request that the log does not have, its last entries were
removed.

>>> import tempfile
>>> from opacus_pi.unlearning.requests import DeletionRequests
>>> path = tempfile.mkdtemp() + "/deletions.db"
>>> _ = DeletionRequests(path, num_examples=64).submit("2026-001", indices=[3, 17])
>>> [(r.request_id, r.indices, r.state) for r in list_requests(path)]
[('2026-001', (3, 17), 'pending')]
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opacus_pi.unlearning.deletion_log import REDACTION, Entry, read_entries
from opacus_pi.unlearning.erased_data import WITHDRAWAL
from opacus_pi.unlearning.honoured_requests import requests_with_weights
from opacus_pi.unlearning.request_entries import Requests, training_set_in
from opacus_pi.unlearning.user_names import UserNames

__all__ = ["ListedRequest", "list_requests"]

ANY_NUMBER = 2**63 - 1  # of examples, if the log names none


@dataclass(frozen=True)
class ListedRequest:
    """One request of a deletion log.

    Args:
        entry: Number of its entry in the log.
        time: When it was submitted, ISO 8601.
        request_id: Its name; None if it was redacted.
        indices: The examples to forget, sorted; None if it was redacted.
        done_entry: Number of the entry that says it was carried out, or None.
        done_time: The time of that entry, or None.
        redaction_entry: Number of the entry that says it was redacted, or None.
        redaction_time: The time of that entry, or None.
        withdrawal_entry: Number of the entry that says it was withdrawn, or None.
        withdrawal_time: The time of that entry, or None.
    """

    entry: int
    time: str
    request_id: str | None
    indices: tuple[int, ...] | None
    done_entry: int | None = None
    done_time: str | None = None
    redaction_entry: int | None = None
    redaction_time: str | None = None
    withdrawal_entry: int | None = None
    withdrawal_time: str | None = None

    @property
    def redacted(self) -> bool:
        """Return whether name, user and examples were removed."""
        return self.request_id is None

    @property
    def state(self) -> str:
        """Return "pending", "carried out", "withdrawn" or "redacted"."""
        if self.redacted:
            return "redacted"
        if self.withdrawal_entry is not None:
            return "withdrawn"
        return "pending" if self.done_entry is None else "carried out"


def list_requests(
    path: str | os.PathLike[str], user: str | None = None
) -> list[ListedRequest]:
    """Return the requests of a deletion log, oldest first. No file is changed.

    Args:
        path: The log.
        user: Return only the requests of this user that were not redacted; None: all
            requests.

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If the log or the weights beside it are damaged or do not belong
            together; with ``user`` also if names were hashed, and the key is missing,
            damaged or another one.
    """
    place = Path(os.path.realpath(path))
    entries = [*read_entries(place)]
    size, _ = training_set_in(entries)
    found, _ = requests_with_weights(place, size or ANY_NUMBER)
    listed = _listed(entries, found)
    if user is None:
        return listed
    requested = [entry for entry in entries if entry.kind == "request"]
    own = {one.number for one in UserNames(place).entries_of(user, requested)}
    return [row for row in listed if row.entry in own]


def _listed(entries: Iterable[Entry], found: Requests) -> list[ListedRequest]:
    """Return the requests with the entries that say what was done about them, and when.

    Args:
        entries: All entries of the log.
        found: The state of the requests after these entries.
    """
    times: dict[int, str] = {}
    done: dict[int, Entry] = {}
    redacted: dict[int, Entry] = {}
    withdrawn: dict[int, Entry] = {}
    for entry in entries:
        times[entry.number] = entry.time
        if entry.kind == "done" and entry.payload is not None:
            done |= dict.fromkeys(entry.payload["requests"], entry)
        elif entry.kind == REDACTION:
            redacted[(entry.payload or {}).get("entry", -1)] = entry
        elif entry.kind == WITHDRAWAL:
            withdrawn[(entry.payload or {}).get("request", -1)] = entry
    rows = []
    for number, request in found.submitted.items():
        by, removed = done.get(number), redacted.get(number)
        taken_back = withdrawn.get(number)
        rows.append(
            ListedRequest(
                entry=number,
                time=times[number],
                request_id=None if request is None else request.request_id,
                indices=None if request is None else request.indices,
                done_entry=None if by is None else by.number,
                done_time=None if by is None else by.time,
                redaction_entry=None if removed is None else removed.number,
                redaction_time=None if removed is None else removed.time,
                withdrawal_entry=None if taken_back is None else taken_back.number,
                withdrawal_time=None if taken_back is None else taken_back.time,
            )
        )
    return rows
