"""What the entries of a deletion record say about requests.

An unbroken chain shows that nobody edited an entry, not that it makes sense: whoever
writes entries by other means could write anything. So each is checked here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opacus_pi._validate import expect

_HEX = set("0123456789abcdef")


@dataclass(frozen=True)
class DeletionRequest:
    """One request.

    Args:
        request_id: The caller's name for it, unique.
        indices: The examples to forget, sorted.
    """

    request_id: str
    indices: tuple[int, ...]


@dataclass
class Requests:
    """The state of a record: who asked, and what was done.

    Args:
        submitted: The requests by name, oldest first.
        done: Names of those that were carried out.
        weights_sha256: Hash of the weights that honour them; empty if there are none.
    """

    submitted: dict[str, DeletionRequest] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    weights_sha256: str = ""


def requests_of(entries: Sequence[dict[str, Any]], num_examples: int) -> Requests:
    """What a record's entries amount to.

    Args:
        entries: Verified, oldest first.
        num_examples: Length of the training set.

    Returns:
        Requests and what was done about them.

    Raises:
        ValueError: If an entry is none of a record about this training set.
    """
    found = Requests()
    for entry in entries:
        if entry["kind"] == "request":
            request = request_of(entry, num_examples)
            _check(request.request_id not in found.submitted, entry, "a new request")
            found.submitted[request.request_id] = request
        elif entry["kind"] == "done":
            found.done |= _done(entry, set(found.submitted) - found.done)
            found.weights_sha256 = entry["body"]["weights_sha256"]
    return found


def request_of(entry: dict[str, Any], num_examples: int) -> DeletionRequest:
    """The request that an entry took down.

    Args:
        entry: Of kind ``"request"``.
        num_examples: Length of the training set.

    Raises:
        ValueError: If it is none about this training set.
    """
    name, rows = entry["body"].get("id"), entry["body"].get("indices")
    named = isinstance(name, str) and isinstance(rows, list)
    _check(named, entry, "a request with a name and rows")
    inside = all(type(row) is int and 0 <= row < num_examples for row in rows)
    ordered = inside and rows == sorted(set(rows)) and len(rows) > 0
    _check(ordered, entry, f"about rows of {num_examples} examples, each once, sorted")
    return DeletionRequest(name, tuple(rows))


def _done(entry: dict[str, Any], open_ids: set[str]) -> set[str]:
    """Names of the requests that an entry says were carried out."""
    names, digest = (entry["body"].get(key) for key in ("ids", "weights_sha256"))
    told = isinstance(names, list) and all(isinstance(name, str) for name in names)
    _check(told and set(names) <= open_ids, entry, "about requests that were open")
    hashed = isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEX
    _check(hashed, entry, "with the hash of the weights")
    return set(names)


def _check(condition: bool, entry: dict[str, Any], what: str) -> None:
    """Refuse an entry."""
    expect(
        condition,
        "the deletion record's entry",
        entry["number"],
        f"must be {what}",
        "It is the record of another training set, or was not written by "
        "DeletionRequests.",
    )
