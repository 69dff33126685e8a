"""Deletion requests: logged at once, carried out once, in order, across crashes.

A request counts from the moment ``submit`` returns. ``process`` unlearns what is
pending, stores the new weights together with the list of requests that they honour in
one atomic file, and only then logs "done".

*Guarantee.* Whenever a process is killed, the weights on the disk say which requests
they have forgotten already, so that each request is carried out exactly once and no
forgotten example comes back. *What breaks it:* removing the weights file, or putting an
older one in its place; both are noticed and refused.
"""

import errno
import fcntl
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, require
from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.ledger.erased_examples import ErasedExamples
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.same_data import same_data_set
from opacus_pi.models.batches import size_of
from opacus_pi.recording.checkpoints import Checkpoints
from opacus_pi.unlearning.deletion_log import (
    DeletionLog,
    Entry,
    read_entries,
)
from opacus_pi.unlearning.entry_checks import payload_text
from opacus_pi.unlearning.erased_data import (
    REMAINING,
    Remaining,
    facts_of_remaining,
    num_examples_in,
    remaining_in,
    what_remains,
    without_erased,
)
from opacus_pi.unlearning.honouring_weights import (
    StoredWeights,
    load_weights_,
    sha256_of,
    store_weights,
    stored_weights,
    weights_path_of,
)
from opacus_pi.unlearning.rewind import require_states
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult
from opacus_pi.unlearning.user_names import UserNames
from opacus_pi.unlearning.watching import Evaluate

__all__ = [
    "DeletionRequest",
    "DeletionRequests",
    "remaining_by_log",
    "requested_indices",
]

_LISTS_OF_EXAMPLES = {
    "forget_indices": "num_forget",
    "forgotten_before": "num_forgotten_before",
    "forgotten_exactly": "num_forgotten_exactly",
}
# Of a record, for the owner alone: with the seed of a run, and the data that it used,
# its noise and its updates can be computed again.
_OWNER_ONLY = ("seed",)
EvaluationOf = Callable[[NDArray[np.int64]], Evaluate | None]
_DELTA = 1e-5  # at which the log states ε if the guarantee names no δ
_NUM_FIRST = 8  # entries whose number of examples is looked at before one is added
_MAX_DIGITS = 1000  # of a whole number as a name
_HEX = set("0123456789abcdef")
_IF_ERASED = (
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
        weights_sha256: Hash of the weights that honour them; empty if there are none.
    """

    submitted: dict[int, DeletionRequest | None] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    weights_sha256: str = ""

    @property
    def pending(self) -> dict[int, DeletionRequest]:
        """The requests that are not done, oldest first."""
        return {
            number: request
            for number, request in self.submitted.items()
            if number not in self.done and request is not None
        }


class DeletionRequests(Shown):
    """The requests about one model: a deletion log, and the weights that honour it.

    A user's name is stored as a keyed hash. The key is ``key``, or is read from the
    file ``PATH.key``, which is made when the first name is hashed. Keep a copy of it
    apart from the log.

    Args:
        path: The deletion log; made if it does not exist. The weights that honour it
            are stored under the same name with ``.safetensors`` added.
        num_examples: Length of the training set.
        rows_of: Each user's positions in the training set, for requests by user.
        key: Key of the hashes of users' names, at least 16 bytes; None: the key file.
        store_names: Whether to store users' names themselves, for all who can read the
            log.
        data_set: ``fingerprint`` of the training set, which requests then name; None:
            only runs name it. Positions in a data set mean nothing in another one.

    Raises:
        ValueError: If the file is not a deletion log, is damaged, or names another data
            set.
        OSError: If it cannot be made or opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_examples: int,
        rows_of: Mapping[Any, ArrayLike] | None = None,
        *,
        key: bytes | None = None,
        store_names: bool = False,
        data_set: str | None = None,
    ) -> None:
        # Of a link, the files beside the log itself count.
        place = os.path.realpath(path) if os.path.exists(path) else path
        self.log = DeletionLog(place)
        self.weights_path = weights_path_of(self.log.path)
        self.num_examples = num_examples
        self.rows_of = rows_of or {}
        self.data_set = data_set
        self._names = UserNames(self.log.path, key, store_names)
        if data_set is not None:
            self._requests()  # refuses the log of another data set

    def _shown(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"num_examples": self.num_examples}
        if isinstance(self.rows_of, Sized):
            facts["num_users"] = len(self.rows_of)
        try:
            found = self._requests()
        except (OSError, ValueError):  # what is shown must not fail
            return {**facts, "log": "cannot be read, call verify"}
        return {
            **facts,
            "num_requests": len(found.submitted),
            "num_pending": len(found.pending),
            "num_done": len(found.done),
            "num_redacted": [*found.submitted.values()].count(None),
        }

    def submit(
        self,
        request_id: str | int,
        *,
        indices: ArrayLike | None = None,
        user: str | int | None = None,
    ) -> DeletionRequest:
        """Log a request; it is on the disk when this returns.

        Submitting the same request again changes nothing, so after a crash a caller
        may simply repeat it.

        Args:
            request_id: A name for the request: a string, or a whole number, which
                is stored as its decimal digits. A string is stored unchanged: do not
                use the name of a person.
            indices: The examples to forget, positions in the training set; None: all
                of the user's.
            user: The user whose examples to forget; None: of no known user. With
                indices, these must be of the user.

        Returns:
            The request.

        Raises:
            ValueError: If the name is neither a string nor a whole number, neither
                indices nor user are given, the indices are bad or not the user's, the
                user is unknown, or the name stands for another request. Nothing was
                written.
            OSError: If it could not be written.
        """
        name = plain_name("request_id", request_id)
        rows = tuple(self._rows(indices, user).tolist())
        self._require_size()
        payload: dict[str, Any] = {"indices": rows, "num_examples": self.num_examples}
        if self.data_set is not None:
            payload["data_set"] = self.data_set
        if user is not None:
            payload |= self._names.facts(plain_name("user", user))
        entry = self.log.append("request", payload, name=name)
        known = _request_of(entry, self.num_examples)
        require(
            known.indices == rows,
            f"request_id {name!r} was submitted before for other examples.",
            "Use a new request_id.",
        )
        return known

    def _require_size(self) -> None:
        """Refuse to add to a log whose first requests name another number of examples.

        A position that its training set does not have would make the log unusable.
        """
        for entry in itertools.islice(self.log.entries(), _NUM_FIRST):
            _require_num_examples(entry, self.num_examples)

    @property
    def pending(self) -> list[DeletionRequest]:
        """Requests that are not yet done, oldest first."""
        return [*self._requests().pending.values()]

    @property
    def submitted(self) -> list[DeletionRequest]:
        """All requests that were not redacted, oldest first."""
        found = self._requests().submitted.values()
        return [request for request in found if request is not None]

    def submitted_by(self, user: str | int) -> list[DeletionRequest]:
        """Return the requests of a user that were not redacted, oldest first.

        Args:
            user: The name, as passed to ``submit``.

        Raises:
            ValueError: If the log has hashed names, and its key is missing, damaged or
                that of another log.
        """
        name = plain_name("user", user)
        entries = (entry for entry in self.log.entries() if entry.kind == "request")
        return [
            _request_of(entry, self.num_examples)
            for entry in self._names.entries_of(name, entries)
        ]

    def redact(self, request_id: str | int, reason: str = "") -> None:
        """Remove what the log says about a request that was carried out.

        Its name, its user and its indices are removed for good. The log keeps
        that a request was made and carried out, with both times, and still verifies.
        The weights file keeps the positions of all forgotten examples, without saying
        who asked: no later run may train on them. The name is free again. Other files
        are not changed: ``record.json`` in the directory of a run lists the positions
        and the names of the run's requests.

        Args:
            request_id: The request's name.
            reason: Why, to be stored with the redaction.

        Raises:
            ValueError: If there is no such request, or it is still pending.
            OSError: If it could not be written.
        """
        name = plain_name("request_id", request_id)
        entry = self.log.find(name)
        found = self._requests()
        number = -1 if entry is None else entry.number
        expect(
            number in found.submitted,
            "request_id",
            name,
            "must name a request of this log",
            "No such request was submitted, or it was redacted.",
        )
        expect(
            number in found.done,
            "request_id",
            name,
            "must name a request that was carried out",
            "It is still pending. Carry it out first, with process or 'opacus-pi "
            "unlearn --log'.",
        )
        self.log.redact(number, reason)

    def resume(self, unlearner: Unlearner) -> None:
        """Load the stored weights, to continue from the requests carried out so far.

        ``process`` does this by itself.

        The unlearner takes the stored weights, if requests were honoured before, and
        the record of what was forgotten and how. Only then does its ``plan`` describe
        the run that would follow, and its guarantee cover all runs before it.

        Args:
            unlearner: Made from the trained model.

        Raises:
            ValueError: If the stored weights are not those of the log, or do not fit
                the model.
            RuntimeError: If another process is carrying out requests.
        """
        with self._locked():
            self._resume(unlearner, self._requests())

    def process(
        self,
        unlearner: Unlearner,
        train_set: Dataset[Any],
        *,
        together: bool = False,
        checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
        deletion_policy: DeletionPolicy | None = None,
        evaluation_of: EvaluationOf | None = None,
        **options: Any,
    ) -> list[UnlearningResult]:
        """Carry out what is pending, each request once.

        Args:
            unlearner: Made from the trained model. If requests were honoured before,
                it continues from the stored weights.
            train_set: The training set.
            together: Forget all pending requests in one run, instead of one by one.
            checkpoints: The saved states of the training. Then each request is carried
                out by ``Unlearner.rewind``, not by its unlearning method.
            deletion_policy: The policy of the training, for filtered rewinds; None:
                exact ones.
            evaluation_of: Is given the examples that a run is about to forget, int64
                ``(m,)``, those of all its requests; returns the ``evaluate`` of that
                run, or None. For metrics on the forget set, which are otherwise easily
                measured on the examples of another request.
            **options: ``num_epochs``, ``evaluate``, ``batch_size``, ``stop``,
                ``delta``, ``callbacks``, ``checkpoint``, ``progress``, ``collate_fn``
                of ``unlearn``; or ``update``, ``collate_fn``, ``evaluate`` of
                ``rewind``.

        Returns:
            The result of each run, an empty list if nothing was pending. The names of
            its requests are in ``record["requests"]``. Without ``checkpoints``, a
            request whose examples were all forgotten before needs no run: it is only
            logged as carried out.

        Raises:
            ValueError: As ``resume`` and ``unlearn`` or ``rewind``, or if the training
                set has another length, or another fingerprint than the log names, or
                both ``evaluate`` and ``evaluation_of`` are given. What was carried out
                before it stays; the request in question stays pending.
            RuntimeError: If another process is carrying out requests.
        """
        _require_one_evaluation(evaluation_of, options)
        expect(
            size_of(train_set) == self.num_examples,
            "train_set",
            f"{size_of(train_set)} examples",
            f"must have {self.num_examples} examples, as this log's training set has",
            f"Pass the data set that the model was trained on. {_IF_ERASED}",
        )
        require_states(checkpoints, deletion_policy)
        if checkpoints is not None:
            options |= {"checkpoints": checkpoints, "deletion_policy": deletion_policy}
        carry_out = unlearner.unlearn if checkpoints is None else unlearner.rewind
        with self._locked():
            found = self._requests(fingerprint(train_set))
            honoured = self._resume(unlearner, found)
            finished = [number for number in found.pending if number in honoured]
            if finished:  # the process was killed before it could log "done"
                facts = {"found": "in the stored weights"}
                self._log_done(finished, facts, _left(train_set, unlearner))
            pending = {n: r for n, r in found.pending.items() if n not in honoured}
            results = []
            for group in _groups(pending, together):
                rows = np.unique([i for one in group.values() for i in one.indices])
                if checkpoints is None and self._has_forgotten(rows):
                    facts = {"found": "forgotten by earlier runs"}
                    self._log_done([*group], facts, _left(train_set, unlearner))
                    honoured |= set(group)
                    continue
                if evaluation_of is not None:
                    options["evaluate"] = evaluation_of(rows)
                result = carry_out(train_set, rows, **options)
                honoured |= set(group)
                hashes = [found.hashes[number] for number in honoured]
                facts, left = _run_facts(result), _left(train_set, unlearner)
                self._complete(group, facts, left, unlearner, hashes)
                names = [request.request_id for request in group.values()]
                record = {**result.record, "requests": names}
                results.append(replace(result, record=record))
        return results

    def erased(self, data_set: Any) -> ErasedExamples:
        """Return the training set after data of forgotten examples were erased.

        Pass it to ``process`` and to ``Unlearner`` in place of the training set. All
        examples keep their positions. The remaining ones are compared with the
        fingerprint that the log stored when the latest request was carried out.

        Args:
            data_set: The training set without the examples that were forgotten: the
                others in their old order, or all in their old places with anything in
                place of the forgotten ones.

        Returns:
            A data set of the old length. To read an erased example is an error.

        Raises:
            ValueError: If the log does not say what remains, because no request was
                carried out or an earlier release did it, or if anything but exactly
                the forgotten examples is missing or changed.
        """
        self._requests()  # refuses the log of another training set
        stored = stored_weights(self.weights_path, self.num_examples).forgotten
        return without_erased(remaining_in(self.log.entries(), stored), data_set)

    def _has_forgotten(self, rows: NDArray[np.int64]) -> bool:
        """Return whether the stored weights have forgotten all of some examples."""
        stored = stored_weights(self.weights_path, self.num_examples)
        return bool(np.isin(rows, stored.forgotten).all())

    def _complete(
        self,
        group: Mapping[int, DeletionRequest],
        facts: dict[str, Any],
        remains: dict[str, Any],
        unlearner: Unlearner,
        honoured: list[str],
    ) -> None:
        """Store the weights of a run, then log that its requests were carried out.

        The order matters. If the process is killed between the two steps, the weights
        already list the requests, and the next ``process`` only adds the missing log
        entry. In the other order the log would promise weights that do not exist.

        Args:
            group: The requests of the run, by the number of their entry.
            facts: What the log stores about the run.
            remains: What it stores about the examples that remain.
            unlearner: Its weights are stored.
            honoured: Hashes of the entries of all requests that the weights honour.
        """
        payload_text(facts)  # what the log would refuse is found before weights change
        store_weights(self.weights_path, unlearner, honoured)
        self._log_done([*group], facts, remains)

    def _log_done(
        self, numbers: list[int], facts: dict[str, Any], remains: dict[str, Any]
    ) -> None:
        """Log that requests were carried out, and by which weights.

        What remains is logged first: if the process is killed between the two entries,
        the requests are still pending, and both entries are made again.
        """
        digest = sha256_of(self.weights_path)
        payload = {"requests": numbers, "weights_sha256": digest, **facts}
        self.log.append(REMAINING, remains)
        self.log.append("done", payload)

    def _requests(self, data_set: str | None = None) -> Requests:
        """Read the log and return its requests.

        Args:
            data_set: Fingerprint of the training set; None: the one that was given
                when the log was opened.
        """
        entries = self.log.entries()
        return requests_of(entries, self.num_examples, data_set or self.data_set)

    def _resume(self, unlearner: Unlearner, found: Requests) -> set[int]:
        """Load the stored weights, if any, and return the requests they honour.

        The unlearner's list of forgotten examples and its history are extended too, so
        that its next guarantee covers the earlier runs.
        """
        stored = stored_weights(self.weights_path, self.num_examples)
        honoured = _honoured(stored, found, self.weights_path)
        if honoured:
            load_weights_(unlearner.model, stored, self.weights_path)
            forgotten = np.array(stored.forgotten, dtype=np.int64)
            unlearner.forgotten = np.union1d(unlearner.forgotten, forgotten)
            exactly = np.array(stored.forgotten_exactly, dtype=np.int64)
            unlearner.forgotten_exactly = np.union1d(
                unlearner.forgotten_exactly, exactly
            )
            unlearner.history = unlearner.history.joined(stored.history)
        return honoured

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Context in which no other process carries out requests about this model.

        Two processes that unlearn at once would each overwrite the other's weights. The
        lock is a file beside the log; the system releases it when a process ends, even
        if that was killed.
        """
        place = f"{self.log.path}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(place, flags, 0o600)
        except OSError as error:
            words = (
                "The lock file is a link, which is not opened. Remove it and call "
                "process again"
                if error.errno == errno.ELOOP
                else f"{error.strerror}: requests are carried out with a lock file "
                "beside the log. Keep the log in a directory in which you may write"
            )
            raise OSError(error.errno, words, place) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(
                    f"{self.log.path}: another process is carrying out requests. "
                    "Wait until it is done."
                ) from error
            yield
        finally:
            os.close(handle)

    def _rows(
        self, indices: ArrayLike | None, user: str | int | None
    ) -> NDArray[np.int64]:
        """Return the examples that a request is about, sorted and checked.

        Raises:
            ValueError: As ``submit``.
        """
        require(
            indices is not None or user is not None,
            "indices or user must be given, got neither.",
            "Pass indices, or a user of rows_of.",
        )
        chosen, size = indices, self.num_examples
        if user is not None:
            own = self._rows_of_user(plain_name("user", user))
            chosen = own if indices is None else indices
        rows = distinct_indices("indices", cast(ArrayLike, chosen), size)
        if user is not None and indices is not None:
            others = np.setdiff1d(rows, np.asarray(own))
            expect(
                not len(others),
                "indices",
                others[:5].tolist(),
                f"must be examples of the user {user!r} in rows_of",
                "Pass some of the user's examples, or leave out user.",
            )
        return rows

    def _rows_of_user(self, name: str) -> ArrayLike:
        """Return the examples of a user, whose key may be a number or its digits."""
        keys: list[Any] = [name]
        if name.lstrip("-").isdecimal() and str(int(name)) == name:
            keys.append(int(name))
        known = [key for key in keys if key in self.rows_of]
        expect(
            len(known) == 1,
            "user",
            name,
            f"must be one of the {len(self.rows_of)} users of rows_of",
            "rows_of has this user twice, as a number and as a text: keep one."
            if known
            else "Add the user's examples to rows_of; positions are passed as indices.",
        )
        return self.rows_of[known[0]]


def requested_indices(
    path: str | os.PathLike[str], num_examples: int, data_set: str | None = None
) -> NDArray[np.int64]:
    """Return every example that a log's requests ask to forget, done or pending.

    No file is changed. The examples of redacted requests are known from the weights
    file beside the log. If that file honours requests that the log does not have, the
    log's last entries were removed.

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
    named = {i for r in found.submitted.values() if r is not None for i in r.indices}
    if None in found.submitted.values():
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
        found.done |= _honoured(stored, found, weights)
    return found, stored


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
        is_request = entry.kind == "request"
        facts = (entry.payload if is_request else facts_of_remaining(entry)) or {}
        if type(facts.get("num_examples")) is int:
            size = facts["num_examples"]
        if isinstance(facts.get("data_set"), str):
            data_set = facts["data_set"]
    return size, data_set


def _require_one_evaluation(
    evaluation_of: EvaluationOf | None, options: Mapping[str, Any]
) -> None:
    """Refuse two evaluations of one run.

    Args:
        evaluation_of: As for ``process``.
        options: Its other options.
    """
    require(
        evaluation_of is None or "evaluate" not in options,
        "evaluate and evaluation_of were both given.",
        "Pass evaluation_of, which is told what each run forgets, or evaluate.",
    )


def _left(train_set: Any, unlearner: Unlearner) -> dict[str, Any]:
    """Return what the log stores about the examples that remain after a run."""
    return what_remains(train_set, unlearner.forgotten)


def _groups(
    pending: dict[int, DeletionRequest], together: bool
) -> list[dict[int, DeletionRequest]]:
    """Return the requests that each run is to carry out, in the order of the log."""
    if together:
        return [pending] if pending else []
    return [{number: request} for number, request in pending.items()]


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


def _run_facts(result: UnlearningResult) -> dict[str, Any]:
    """Return what the log stores about a run."""
    return {
        "run": to_be_logged(result.record),
        "guarantee": result.guarantee.kind,
        **_bound(result.guarantee),
    }


def _bound(guarantee: Guarantee) -> dict[str, float]:
    """Return ε and δ of a guarantee, for the log; nothing unless it is a bound.

    An estimate depends on the forgotten examples, and a log is shown to others.

    Args:
        guarantee: What may be claimed after a run.
    """
    if not guarantee.kind.startswith("certified"):
        return {}
    deltas = [pair.delta for pair in guarantee.statements if pair.delta > 0]
    delta = min(deltas, default=_DELTA)
    found = {
        "epsilon": guarantee.epsilon(delta),
        "reverse_epsilon": guarantee.reverse_epsilon(delta),
    }
    known = {name: value for name, value in found.items() if math.isfinite(value)}
    return {**known, "delta": delta} if known else {}


def to_be_logged(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's record without its seed, and with numbers in place of examples.

    In a log only the requests name examples: when they are redacted, nothing is left.
    The seed stays in the owner's record, because a log is shown to others.

    Args:
        record: Of ``UnlearningResult``.
    """
    left_out = {*_LISTS_OF_EXAMPLES, *_OWNER_ONLY}
    kept = {name: v for name, v in record.items() if name not in left_out}
    counts = {
        counted: len(record[name])
        for name, counted in _LISTS_OF_EXAMPLES.items()
        if isinstance(record.get(name), list)
    }
    return {**kept, **counts}


def plain_name(argument: str, name: Any) -> str:
    """Return a string, or a whole number's decimal digits.

    Args:
        argument: What is named, for the message.
        name: Of any type.

    Raises:
        ValueError: If it is neither.
    """
    whole = isinstance(name, Integral) and abs(int(name)) < 10**_MAX_DIGITS
    expect(
        (whole and not isinstance(name, bool)) or isinstance(name, str),
        argument,
        f"a number of more than {_MAX_DIGITS} digits"
        if isinstance(name, Integral) and not whole
        else repr(name),
        "must be a string or a whole number",
        "Convert it with str(...).",
    )
    return str(name)


# ------------------------------------------------------------------ reading the log


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
        _require_num_examples(entry, num_examples)
        _require_data_set(entry, data_set)
        if entry.kind == "request":
            found.hashes[entry.number] = entry.hash
            found.submitted[entry.number] = (
                None if entry.redacted else _request_of(entry, num_examples)
            )
        elif entry.kind == "done" and entry.payload is not None:
            found.done |= _done_of(entry, set(found.submitted) - found.done)
            found.weights_sha256 = entry.payload["weights_sha256"]
    return found


def _require_num_examples(entry: Entry, num_examples: int) -> None:
    """Refuse a request that names another number of examples.

    Args:
        entry: Any entry. Requests of earlier releases name none.
        num_examples: Length of the training set.
    """
    named = (entry.payload or {}).get("num_examples")
    if entry.kind != "request" or not isinstance(named, int):
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
        entry: A request, or what was done; both may name the fingerprint.
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
        f"{_IF_ERASED}",
    )


def _request_of(entry: Entry, num_examples: int) -> DeletionRequest:
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


def _check(condition: bool, entry: Entry, what: str) -> None:
    """Refuse an entry that is not of the described kind."""
    require(
        condition,
        f"Entry {entry.number} of the deletion log must be {what}, but is not.",
        "The log belongs to another training set, or was not written by "
        "DeletionRequests. Open the log of this training set.",
    )


def _listed_in(stored: StoredWeights, found: Requests) -> set[int]:
    """Return the requests of a log that stored weights list, by hash or by name."""
    by_hash = {n for n, h in found.hashes.items() if h in stored.entries}
    by_name = {
        number
        for number, request in found.submitted.items()
        if request is not None and request.request_id in stored.names
    }
    return by_hash | by_name


def _honoured(stored: StoredWeights, found: Requests, path: Path) -> set[int]:
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
