"""The requests in the entries of a deletion log, and which of them were carried out.

An unbroken chain shows that no entry was edited, not that the entry makes sense: other
programs can append to a log. So each entry is checked here when it is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from opacus_pi._validate import expect, require
from opacus_pi.ledger.same_data import same_data_set
from opacus_pi.unlearning.deletion_log import Entry
from opacus_pi.unlearning.erased_data import (
    TRAINING_SET,
    WITHDRAWAL,
    facts_of_remaining,
)

_HEX = set("0123456789abcdef")
IF_ERASED = (
    "If only data of forgotten examples were erased, pass "
    "DeletionRequests.erased(data_set)."
)


@dataclass(frozen=True)
class DeletionRequest:
    """One request to forget some examples, as it stands in the log.

    Args:
        request_id: The caller's name for it, unique within the log.
        indices: The examples to forget, positions in the training set, sorted.
    """

    request_id: str
    indices: tuple[int, ...]


@dataclass
class Requests:
    """The state of all requests, computed from the entries of a log.

    Requests are identified by the number of their entry, because a redacted request
    has lost its name.

    Args:
        submitted: The requests, oldest first; None for one that was redacted.
        hashes: The hash of each request's entry.
        done: The requests that were carried out.
        withdrawn: The requests that were withdrawn before they were carried out.
        weights_sha256: Hash of the weights that honour them; empty if there are none.
    """

    submitted: dict[int, DeletionRequest | None] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    withdrawn: set[int] = field(default_factory=set)
    weights_sha256: str = ""

    @property
    def pending(self) -> dict[int, DeletionRequest]:
        """The requests that are neither done nor withdrawn, oldest first."""
        return {
            number: request
            for number, request in self.submitted.items()
            if number in self.still_open and request is not None
        }

    @property
    def valid(self) -> dict[int, DeletionRequest | None]:
        """The requests that were not withdrawn, oldest first; None: redacted."""
        return {n: one for n, one in self.submitted.items() if n not in self.withdrawn}

    @property
    def still_open(self) -> set[int]:
        """Numbers of the requests that are neither done nor withdrawn."""
        return self.submitted.keys() - self.done - self.withdrawn


def requests_of(
    entries: Iterable[Entry], num_examples: int, data_set: str | None = None
) -> Requests:
    """Return the state of all requests after a log's entries.

    An unbroken chain shows that no entry was edited, not that the entry makes sense:
    other programs can append to a log. So each is checked here.

    Args:
        entries: Verified, oldest first.
        num_examples: Length of the training set.
        data_set: Its fingerprint; None: not known.

    Raises:
        ValueError: If an entry does not belong in a log about this training set.
    """
    found = Requests()
    for entry in entries:
        require_num_examples(entry, num_examples)
        _require_data_set(entry, data_set)
        if entry.kind == "request":
            found.hashes[entry.number] = entry.hash
            found.submitted[entry.number] = (
                None if entry.redacted else request_in(entry, num_examples)
            )
        elif entry.kind == "done" and entry.payload is not None:
            found.done |= _done_of(entry, found.still_open)
            found.weights_sha256 = entry.payload["weights_sha256"]
        elif entry.kind == WITHDRAWAL and entry.payload is not None:
            found.withdrawn.add(_withdrawn_by(entry, found.still_open))
    return found


def training_set_in(entries: Iterable[Entry]) -> tuple[int | None, str | None]:
    """Return what a log says about its training set: length and fingerprint.

    Args:
        entries: All entries of a verified log.

    Returns:
        Both from the latest entry that names them; None where no entry does.
    """
    size: int | None = None
    data_set: str | None = None
    for entry in entries:
        in_itself = entry.kind in ("request", TRAINING_SET)
        facts = (entry.payload if in_itself else facts_of_remaining(entry)) or {}
        if type(facts.get("num_examples")) is int:
            size = facts["num_examples"]
        if isinstance(facts.get("data_set"), str):
            data_set = facts["data_set"]
    return size, data_set


def require_num_examples(entry: Entry, num_examples: int) -> None:
    """Refuse a request that names another number of examples.

    Args:
        entry: Any entry. Requests, but for those of earlier releases, and the entry
            about the training set name it.
        num_examples: Length of the training set.
    """
    named = (entry.payload or {}).get("num_examples")
    if entry.kind not in ("request", TRAINING_SET) or not isinstance(named, int):
        return
    expect(
        named == num_examples,
        "num_examples",
        num_examples,
        f"must be {named}, the number in entry {entry.number} of the deletion log",
        "The log belongs to another training set. Open the log of this one.",
    )


def _require_data_set(entry: Entry, data_set: str | None) -> None:
    """Refuse an entry about another data set, as far as both are known.

    Args:
        entry: Any entry. That about the training set names the fingerprint, those about
            what remains do, and in earlier releases requests and runs.
        data_set: The fingerprint of the training set; None: not known.
    """
    payload = entry.payload or {}
    facts = payload.get("run") if entry.kind == "done" else payload
    named = facts.get("data_set") if isinstance(facts, dict) else None
    if data_set is None or not isinstance(named, str):
        return
    expect(
        same_data_set(named, data_set),
        "data_set",
        data_set,
        f"must be {named}, the one in entry {entry.number} of the deletion log",
        "The log belongs to another training set. Open the log of this one. "
        f"{IF_ERASED}",
    )


def request_in(entry: Entry, num_examples: int) -> DeletionRequest:
    """Return the request in an entry, after checking that it can be carried out."""
    rows: Any = (entry.payload or {}).get("indices")
    named = entry.kind == "request" and entry.name is not None
    _check(named and isinstance(rows, list), entry, "a request with a name and indices")
    inside = all(type(row) is int and 0 <= row < num_examples for row in rows)
    ordered = inside and rows == sorted(set(rows)) and len(rows) > 0
    _check(
        ordered,
        entry,
        f"a request with sorted indices below {num_examples}, each of them once",
    )
    return DeletionRequest(cast(str, entry.name), tuple(rows))


def _done_of(entry: Entry, still_open: set[int]) -> set[int]:
    """Return the numbers of the requests that an entry marks as carried out.

    Args:
        entry: Of kind "done", not redacted.
        still_open: Requests that were submitted before it and are not yet done.

    Raises:
        ValueError: If it marks any other request, or names no weights.
    """
    payload = entry.payload or {}
    numbers, digest = payload.get("requests"), payload.get("weights_sha256")
    listed = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    _check(
        listed and set(cast(list[int], numbers)) <= still_open,
        entry,
        "an entry about requests that were pending",
    )
    hashed = isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEX
    _check(hashed, entry, "an entry with the hash of the weights")
    return set(cast(list[int], numbers))


def _withdrawn_by(entry: Entry, still_open: set[int]) -> int:
    """Return the number of the request that an entry withdraws.

    Args:
        entry: Of kind "withdrawal", not redacted.
        still_open: Requests that were submitted before it and are neither done nor
            withdrawn.

    Raises:
        ValueError: If it names any other request.
    """
    number = (entry.payload or {}).get("request")
    known = type(number) is int and number in still_open
    _check(known, entry, "an entry about a request that was pending")
    return cast(int, number)


def _check(condition: bool, entry: Entry, what: str) -> None:
    """Refuse an entry that is not of the described kind."""
    require(
        condition,
        f"Entry {entry.number} of the deletion log must be {what}, but is not.",
        "The log belongs to another training set, or was not written by "
        "DeletionRequests. Open the log of this training set.",
    )
