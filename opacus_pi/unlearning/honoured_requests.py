"""Which requests the weights beside a log honour, and which examples all of them name.

The log and the weights are two files. A process may be killed after it stored weights
and before it logged that; then the list in the weights' file counts. Nothing is
written here.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect, require
from opacus_pi.unlearning.deletion_log import read_entries
from opacus_pi.unlearning.erased_data import Remaining, num_examples_in, remaining_in
from opacus_pi.unlearning.honouring_weights import (
    StoredWeights,
    sha256_of,
    stored_weights,
    weights_path_of,
)
from opacus_pi.unlearning.request_entries import Requests, requests_of

__all__ = ["remaining_by_log", "requested_indices", "requests_with_weights"]


def requested_indices(
    path: str | os.PathLike[str], num_examples: int, data_set: str | None = None
) -> NDArray[np.int64]:
    """Return every example that a log's requests ask to forget, done or pending.

    Requests that were withdrawn do not count. The examples of redacted requests are
    known from the weights file beside the log. If that file honours requests that the
    log does not have, the log's last entries were removed. No file is changed.

    Args:
        path: The deletion log.
        num_examples: Length of the training set.
        data_set: Its fingerprint; None: not known.

    Returns:
        int64 ``(m,)``, sorted, each once.

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If the log or the weights are damaged, do not belong together, or
            are about another training set, or a request was redacted and there are no
            weights.
    """
    found, stored = requests_with_weights(path, num_examples, data_set)
    valid = found.valid.values()
    named = {i for r in valid if r is not None for i in r.indices}
    if None in valid:
        weights = weights_path_of(os.path.realpath(path))
        expect(
            weights.exists(),
            "weights_path",
            weights,
            "must exist, because only this file contains the examples of redacted "
            "requests",
            "Restore it from a copy.",
        )
        named |= set(stored.forgotten)
    return np.array(sorted(named), dtype=np.int64)


def requests_with_weights(
    path: str | os.PathLike[str], num_examples: int, data_set: str | None = None
) -> tuple[Requests, StoredWeights]:
    """Return the requests of a log and what the weights beside it honour.

    No file is changed.

    Args:
        path: The deletion log.
        num_examples: Length of the training set.
        data_set: Its fingerprint; None: not known.

    Returns:
        The state of all requests, and the content of the weights file, which is empty
        if there is none. What the weights honour counts as done, also if a process was
        killed before it could log that.

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If the log or the weights are damaged, are about another training
            set, or do not belong together: the log then lacks its last entries.
    """
    found = requests_of(read_entries(path), num_examples, data_set)
    weights = weights_path_of(os.path.realpath(path))
    stored = stored_weights(weights, num_examples)
    if weights.exists():
        # Refuses a log that lacks some of them.
        found.done |= honoured_by(stored, found, weights)
    return found, stored


def remaining_by_log(path: str | os.PathLike[str]) -> list[Remaining]:
    """Return what a log says about the examples that remain, latest first.

    No file is changed.

    Args:
        path: The deletion log.

    Returns:
        One entry for each run; an empty list if an earlier release wrote the log, or no
        request was carried out.

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If the log or the weights are damaged.
    """
    place = os.path.realpath(path)  # the weights are beside the log, not beside a link
    entries = [*read_entries(place)]
    size = num_examples_in(entries)
    if size is None:
        return []
    requests_of(entries, size)  # refuses entries that no DeletionRequests wrote
    stored = stored_weights(weights_path_of(place), size).forgotten
    return remaining_in(entries, stored)


def honoured_by(stored: StoredWeights, found: Requests, path: Path) -> set[int]:
    """Return the requests that stored weights honour.

    If the last "done" entry of the log names these weights, they honour what is logged
    as done. Otherwise a process may have been killed after it stored weights and before
    it logged that: then the weights' own list counts. It must contain more than the log
    says, and only requests of this log. Anything else is an older or a foreign file,
    and with it examples would come back that were forgotten.

    Args:
        stored: The content of the weights file; empty if there is no file.
        found: The requests in the log.
        path: The weights file.

    Returns:
        Numbers of the requests' entries.

    Raises:
        ValueError: If the log does not know the weights, or they honour less than it
            says.
    """
    if found.done and path.exists() and found.weights_sha256 == sha256_of(path):
        return set(found.done)
    honoured = _listed_in(stored, found)
    known = len(honoured) == len(stored.entries) + len(stored.names)
    newer = found.done < honoured or not (found.done or honoured)
    require(
        known and newer,
        f"{path} does not have the weights that honour the {len(found.done)} logged "
        "request(s).",
        _remedy_for_lost_weights(path),
    )
    return honoured


def _listed_in(stored: StoredWeights, found: Requests) -> set[int]:
    """Return the requests of a log that stored weights list, by hash or by name."""
    by_hash = {n for n, h in found.hashes.items() if h in stored.entries}
    by_name = {
        number
        for number, request in found.submitted.items()
        if request is not None and request.request_id in stored.names
    }
    return by_hash | by_name


def _remedy_for_lost_weights(path: Path) -> str:
    """Return what to do about stored weights that are not those of their log.

    Args:
        path: The weights file, which has the log's name with a suffix.
    """
    log = path.with_suffix("")
    if not path.exists() and log.exists() and log.stat().st_nlink > 1:
        return (
            "The log has more than one name (a hard link), and its weights are beside "
            "another one: open it under that name."
        )
    return (
        "Restore the file from a copy. If there is none, submit all requests again, to "
        "a new log, and process them with the model as it was trained."
    )
