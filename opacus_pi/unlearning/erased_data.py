"""What remains of a training set after its deletion requests, in the deletion log.

When requests were carried out, the log stores a fingerprint of the examples that
remain. If the data of the forgotten examples are erased later, this fingerprint is what
the rest can be compared with: that of the whole data set no longer fits.

The fingerprint has an entry of its own, before that of the run, because no auditor may
see it: whoever holds the original data can try which examples to leave out until the
fingerprint fits, and so learns what was forgotten. That of the whole training set has
one, too: whoever holds the examples that remain can try which ones to add.

*Guarantee.* A data set is accepted only if exactly the forgotten examples are missing,
and all others agree with the log in every part of the fingerprint that it stores.
*What breaks it:* what no fingerprint reads, as ``opacus_pi.ledger.same_data`` says. A
guarantee then lists it as a declaration.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opacus_pi._validate import require
from opacus_pi.ledger.erased_examples import ErasedExamples
from opacus_pi.ledger.fingerprint import fingerprint, fingerprint_of_some
from opacus_pi.ledger.same_data import (
    name_without_erased,
    same_data_set,
    unlike_what_remains,
)
from opacus_pi.unlearning.deletion_log import Entry

TRAINING_SET = "training set"  # kind of an entry: fingerprint and length
REMAINING = "remaining"  # kind of an entry; the payload of ``what_remains``
WITHDRAWAL = "withdrawal"  # kind of an entry: number of a request, and why
_REMEDY = (
    "Pass the training set as it was, or without exactly the examples that were "
    "forgotten: the others in their old order, or all in their old places with "
    "anything in place of the forgotten ones. If several requests were redacted, the "
    "log cannot tell their examples apart: erase the files of all of them, or of none."
)


@dataclass(frozen=True)
class Remaining:
    """What the log says about the training set after some of its requests.

    Args:
        data_set: Fingerprint of the training set.
        num_examples: Its length.
        fingerprint: Of the examples that remain, by ``fingerprint_of_some``.
        forgotten: Positions of the others, sorted.
    """

    data_set: str
    num_examples: int
    fingerprint: str
    forgotten: NDArray[np.int64]


def what_remains(train_set: Any, forgotten: ArrayLike) -> dict[str, Any]:
    """Return what the log stores about the examples that remain.

    Args:
        train_set: The training set.
        forgotten: Positions of all examples that were forgotten until now.
    """
    size = len(train_set)
    kept = np.setdiff1d(np.arange(size), np.asarray(forgotten, dtype=np.int64))
    return {
        "data_set": fingerprint(train_set),
        "num_examples": size,
        "fingerprint": fingerprint_of_some(train_set, kept),
    }


def remaining_in(
    entries: Iterable[Entry], stored: Iterable[int] = ()
) -> list[Remaining]:
    """Return what the log says about the remaining examples, latest first.

    Args:
        entries: All entries of a verified log, oldest first.
        stored: The forgotten examples that the weights file lists. They are needed for
            redacted requests, whose examples the log no longer names.
    """
    rows: dict[int, list[int] | None] = {}
    runs: list[tuple[dict[str, Any] | None, frozenset[int]]] = []
    latest: dict[str, Any] | None = None
    done: set[int] = set()
    for entry in entries:
        payload = entry.payload or {}
        if entry.kind == "request":
            rows[entry.number] = None if entry.redacted else payload.get("indices")
        elif entry.kind == "done" and entry.payload is not None:
            done.update(payload.get("requests", ()))
            latest = facts_of_remaining(entry) or latest
            runs.append((latest, frozenset(done)))
        elif entry.kind == WITHDRAWAL:
            rows.pop(payload.get("request", -1), None)
        elif entry.kind == REMAINING:
            latest = facts_of_remaining(entry)
    found: list[Remaining] = []
    for facts, numbers in runs:
        found += _state(facts, _forgotten_by(numbers, rows, set(stored)))
    if not found or found[-1].forgotten.tolist() != sorted(stored):
        found += _state(latest, set(stored))
    return found[::-1]


def _forgotten_by(
    done: frozenset[int], rows: dict[int, list[int] | None], stored: set[int]
) -> set[int] | None:
    """Return which examples were forgotten after a run; None if that is not known.

    The examples of redacted requests are those of the weights file that no other
    request names. If some redacted requests were carried out before the end of the run
    and others after it, these examples cannot be divided between them.

    Args:
        done: Numbers of the requests that were carried out until then.
        rows: The examples of each request; None for a redacted one.
        stored: The forgotten examples that the weights file lists.

    Returns:
        All of them, unless a redacted request shares examples with a later one: then
        too few, which ``_state`` finds out by their number.
    """
    redacted = {number for number, one in rows.items() if not isinstance(one, list)}
    gone = {row for number in done for row in rows.get(number) or ()}
    if not done <= rows.keys() or (redacted & done and redacted - done):
        return None
    if redacted & done:
        named = {row for one in rows.values() for row in one or ()}
        gone |= stored - named
    return gone


def _state(facts: dict[str, Any] | None, gone: set[int] | None) -> list[Remaining]:
    """Return what an entry says, in a list; an empty list if its examples are unknown.

    Args:
        facts: Of the entry; None if it says nothing about the remaining examples.
        gone: The forgotten examples; None: not known. If their number is not that of
            the entry, they are those of another one.
    """
    if facts is None or not gone:
        return []
    left = facts["num_examples"] - len(gone)
    if left <= 0 or facts["fingerprint"].split(":")[1:2] != [str(left)]:
        return []
    return [Remaining(**facts, forgotten=np.array(sorted(gone), dtype=np.int64))]


def num_examples_in(entries: Iterable[Entry]) -> int | None:
    """Return the length of the training set; None if no entry says what remains.

    Args:
        entries: All entries of a verified log.
    """
    found = [facts_of_remaining(entry) for entry in entries]
    sizes = [facts["num_examples"] for facts in found if facts is not None]
    return sizes[-1] if sizes else None


def facts_of_remaining(entry: Entry) -> dict[str, Any] | None:
    """Return what an entry says about the remaining examples; None if nothing usable.

    Args:
        entry: Any entry, which other programs may have written. Earlier releases stored
            the facts in the entry of the run.
    """
    payload = entry.payload or {}
    facts = payload.get("remaining") if entry.kind == "done" else payload
    if entry.kind not in (REMAINING, "done"):
        return None
    kinds = {"data_set": str, "num_examples": int, "fingerprint": str}
    if not isinstance(facts, dict) or facts.keys() != kinds.keys():
        return None
    usable = all(type(facts[name]) is kind for name, kind in kinds.items())
    return facts if usable else None


def without_erased(states: list[Remaining], data_set: Any) -> ErasedExamples:
    """Return a data set with the positions of the training set, after comparing it.

    Args:
        states: What the log says, latest first.
        data_set: The data set at hand, from which forgotten examples were erased.

    Returns:
        The data set, in which erased examples cannot be read.

    Raises:
        ValueError: If the log does not say what remains, or anything but exactly the
            forgotten examples is missing or changed.
    """
    if isinstance(data_set, ErasedExamples):
        return data_set
    require(
        bool(states),
        "The deletion log does not say which examples remain: no request was carried "
        "out, or an earlier release carried them out.",
        "Pass the whole training set. The log stores what remains when the next "
        "request is carried out.",
    )
    size = len(data_set)
    fitting = [
        state
        for state in states
        if size in (state.num_examples, state.num_examples - len(state.forgotten))
    ]
    # Whatever agrees with an earlier state agrees with all later ones, too. Of these
    # the earliest counts: what was forgotten after it can still be read.
    found = bisect.bisect_left(
        fitting, True, key=lambda state: bool(_difference(state, data_set))
    )
    if not found:
        raise ValueError(f"{_refusal(states, data_set, fitting)} {_REMEDY}")
    return _wrapped(fitting[found - 1], data_set)


def _places(state: Remaining, data_set: Any) -> NDArray[np.int64]:
    """Return the positions in the data set at hand of the examples that must remain.

    Args:
        state: What the log says.
        data_set: All examples or only the remaining ones, by its length.
    """
    if len(data_set) != state.num_examples:
        return np.arange(len(data_set))
    return np.setdiff1d(np.arange(state.num_examples), state.forgotten)


def _difference(state: Remaining, data_set: Any) -> str:
    """Return in what the remaining examples differ; empty if they agree.

    Args:
        state: What the log says.
        data_set: The data set at hand, of a length that fits.
    """
    name = fingerprint_of_some(data_set, _places(state, data_set))
    return unlike_what_remains(state.fingerprint, name)


def _numbers(states: list[Remaining]) -> str:
    """Return how many examples remain after each run, as ``485, 446 or 437``.

    Args:
        states: What the log says, latest first.
    """
    sizes = dict.fromkeys(s.num_examples - len(s.forgotten) for s in states[::-1])
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last


def _refusal(states: list[Remaining], data_set: Any, fitting: list[Remaining]) -> str:
    """Return why a data set is neither the training set nor what remains of it.

    Args:
        states: What the log says, latest first.
        data_set: The data set at hand.
        fitting: What it says after runs that left so many examples, latest first.
    """
    size, total = len(data_set), states[0].num_examples
    if not fitting:
        return (
            f"The data set has {size} examples, but the training set of the deletion "
            f"log has {total}, of which {_numbers(states)} remain after its requests."
            f"{_by_number(states, size)}"
        )
    gone = len(fitting[0].forgotten)
    return (
        f"The data set has {size} examples, but they are not those of the training set "
        f"of the deletion log: the {total - gone} that remain after {gone} were "
        f"forgotten differ in {_difference(fitting[0], data_set)}."
    )


def _by_number(states: list[Remaining], size: int) -> str:
    """Return what the number of examples suggests; empty if it suggests nothing.

    Args:
        states: What the log says, latest first.
        size: Number of examples at hand, which fits no state.
    """
    total, gone = states[0].num_examples, len(states[0].forgotten)
    least = total - gone
    if size > total:
        return (
            f" These are {size - total} too many: leave out what was added since the "
            "training."
        )
    if size < least:
        return f" {least - size} of those that must remain are missing."
    return (
        f" If none of these is missing and no file was added, {size - least} of the "
        f"{gone} forgotten examples are still there: erase them, too."
    )


def _wrapped(state: Remaining, data_set: Any) -> ErasedExamples:
    """Return a data set that was compared, with the positions of the training set.

    Args:
        state: What the log says, which agrees.
        data_set: The data set at hand.
    """
    places = _places(state, data_set)
    rows = np.full(state.num_examples, -1, dtype=np.int64)
    rows[np.setdiff1d(np.arange(state.num_examples), state.forgotten)] = places
    name = fingerprint_of_some(data_set, places)
    known = name_without_erased(
        state.data_set, state.fingerprint, name, len(state.forgotten)
    )
    return ErasedExamples(data_set, rows, known)


def known_data_set(states: list[Remaining], data_set: Any) -> Any:
    """Return the training set of a log, whether or not forgotten examples were erased.

    Args:
        states: What the log says, latest first.
        data_set: The data set at hand.

    Returns:
        The data set itself, if it is the training set or the log does not say what
        remains; otherwise as ``without_erased``.

    Raises:
        ValueError: If anything but exactly the forgotten examples is missing or
            changed.
    """
    if not states or same_data_set(states[0].data_set, fingerprint(data_set)):
        return data_set
    return without_erased(states, data_set)
