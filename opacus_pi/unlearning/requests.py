"""Deletion requests: logged at once, carried out once, in order, across crashes.

A request counts from the moment ``submit`` returns. ``process`` unlearns what is
pending, stores the new weights together with the list of requests that they honour in
one atomic file, and only then logs "done".

*Guarantee.* Whenever a process is killed, the weights on the disk say which requests
they have forgotten already, so that each request is carried out exactly once and no
forgotten example comes back. *What breaks it:* removing the weights file, or putting an
older one in its place; both are noticed and refused.
"""

import copy
import inspect
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from opacus_pi._printable import in_one_line
from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, require
from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.ledger.erased_examples import ErasedExamples
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.models.batches import size_of
from opacus_pi.recording.checkpoints import Checkpoints
from opacus_pi.unlearning.claims import left_other_weights, runs_in
from opacus_pi.unlearning.deletion_log import DeletionLog
from opacus_pi.unlearning.entry_checks import payload_text, plain_name
from opacus_pi.unlearning.erased_data import (
    REMAINING,
    TRAINING_SET,
    WITHDRAWAL,
    remaining_in,
    what_remains,
    without_erased,
)
from opacus_pi.unlearning.honoured_requests import (
    honoured_by,
    remaining_by_log,
    requested_indices,
)
from opacus_pi.unlearning.honouring_weights import (
    StoredWeights,
    load_weights_,
    sha256_of,
    store_weights,
    stored_weights,
    weights_path_of,
)
from opacus_pi.unlearning.log_lock import locked
from opacus_pi.unlearning.logged_runs import run_facts
from opacus_pi.unlearning.request_entries import (
    IF_ERASED,
    DeletionRequest,
    Requests,
    request_in,
    requests_of,
    require_num_examples,
    training_set_in,
)
from opacus_pi.unlearning.requested_rows import requested_rows
from opacus_pi.unlearning.rewind import require_states
from opacus_pi.unlearning.stored_run import StoredRun
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult
from opacus_pi.unlearning.user_names import UserNames
from opacus_pi.unlearning.watching import Evaluate

__all__ = [
    "DeletionRequest",
    "DeletionRequests",
    "remaining_by_log",
    "requested_indices",
]

EvaluationOf = Callable[[NDArray[np.int64]], Evaluate | None]
_NUM_FIRST = 8  # entries whose number of examples is looked at before one is added


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
        data_set: ``fingerprint`` of the training set, which is then logged before the
            first request; None: only with runs. Positions in a data set mean nothing in
            another one.

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
        self.data_set, self._is_named = data_set, False
        self._names = UserNames(self.log.path, key, store_names)
        if data_set is not None:
            self._requests()  # refuses the log of another data set

    def _shown(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"num_examples": self.num_examples}
        if isinstance(self.rows_of, Sized):
            facts["num_users"] = len(self.rows_of)
        try:
            found = self._requests()
        except (OSError, ValueError) as error:  # what is shown must not fail
            return {**facts, "log": in_one_line(str(error))}
        return {
            **facts,
            "num_requests": len(found.submitted),
            "num_pending": len(found.pending),
            "num_done": len(found.done),
            "num_withdrawn": len(found.withdrawn),
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
                user is unknown, or the name stands for another request or one that was
                withdrawn. Nothing was written.
            OSError: If it could not be written.
        """
        name = plain_name("request_id", request_id)
        found = requested_rows(indices, user, self.rows_of, self.num_examples)
        rows = tuple(found.tolist())
        self._require_size()
        self._name_data_set()
        payload: dict[str, Any] = {"indices": rows, "num_examples": self.num_examples}
        if user is not None:
            payload |= self._names.facts(plain_name("user", user))
        self._require_not_withdrawn(name)
        entry = self.log.append("request", payload, name=name)
        known = request_in(entry, self.num_examples)
        require(
            known.indices == rows,
            f"request_id {name!r} was submitted before for other examples.",
            f"Use another name.{withdraw_first(self, name)}",
        )
        return known

    def _require_not_withdrawn(self, name: str) -> None:
        """Refuse the name of a request that was withdrawn."""
        entry = self.log.find(name)
        require(
            entry is None or entry.number not in self._requests().withdrawn,
            f"request_id {name!r} is the name of a request that was withdrawn.",
            "Use another name.",
        )

    def _require_size(self) -> None:
        """Refuse to add to a log whose first requests name another number of examples.

        A position that its training set does not have would make the log unusable.
        """
        for entry in itertools.islice(self.log.entries(), _NUM_FIRST):
            require_num_examples(entry, self.num_examples)

    def _name_data_set(self) -> None:
        """Log the fingerprint of the training set, unless an entry has it.

        In an entry of its own, because requests may be shown to others.
        """
        if self.data_set is None or self._is_named:
            return
        if training_set_in(self.log.entries())[1] is None:
            facts = {"data_set": self.data_set, "num_examples": self.num_examples}
            self.log.append(TRAINING_SET, facts)
        self._is_named = True

    @property
    def pending(self) -> list[DeletionRequest]:
        """Requests that are neither done nor withdrawn, oldest first."""
        return [*self._requests().pending.values()]

    @property
    def submitted(self) -> list[DeletionRequest]:
        """All requests that were neither redacted nor withdrawn, oldest first."""
        found = self._requests().valid.values()
        return [request for request in found if request is not None]

    def submitted_by(self, user: str | int) -> list[DeletionRequest]:
        """Return a user's requests that were neither redacted nor withdrawn.

        They are in the order of the log, oldest first.

        Args:
            user: The name, as passed to ``submit``.

        Raises:
            ValueError: If the log has hashed names, and its key is missing, damaged or
                that of another log.
        """
        name = plain_name("user", user)
        entries = (entry for entry in self.log.entries() if entry.kind == "request")
        own = [*self._names.entries_of(name, entries)]
        withdrawn = self._requests().withdrawn if own else set()
        return [
            request_in(entry, self.num_examples)
            for entry in own
            if entry.number not in withdrawn
        ]

    def withdraw(self, request_id: str | int, reason: str = "") -> None:
        """Withdraw a pending request, such as one that was entered by mistake.

        The log keeps the request, and gets an entry that says that it was withdrawn. It
        is no longer pending, no run carries it out, and its name cannot be used again.
        Withdrawing it again changes nothing.

        Args:
            request_id: The request's name.
            reason: Why, to be stored with the withdrawal. Do not name a person.

        Raises:
            ValueError: If there is no such request, or it was carried out.
            RuntimeError: If another process is carrying out requests.
            OSError: If it could not be written.
        """
        name = plain_name("request_id", request_id)
        expect(
            isinstance(reason, str),
            "reason",
            repr(reason),
            "must be a string",
            "Pass a text that says why the request is withdrawn.",
        )
        with locked(self.log.path):
            found = self._requests()
            number = self._number_of(name, found)
            stored = stored_weights(self.weights_path, self.num_examples)
            done = found.done | honoured_by(stored, found, self.weights_path)
            expect(
                number not in done,
                "request_id",
                name,
                "must name a pending request",
                "It was carried out: the weights beside the log have forgotten its "
                "examples, and that cannot be withdrawn.",
            )
            if number not in found.withdrawn:
                self.log.append(WITHDRAWAL, {"request": number, "reason": reason})

    def _number_of(self, name: str, found: Requests) -> int:
        """Return the number of a request's entry; refuse a name that no request has."""
        entry = self.log.find(name)
        number = -1 if entry is None else entry.number
        expect(
            number in found.submitted,
            "request_id",
            name,
            "must name a request of this log",
            "No such request was submitted, or it was redacted.",
        )
        return number

    def redact(self, request_id: str | int, reason: str = "") -> None:
        """Remove what the log says about a request that was carried out or withdrawn.

        Its name, its user and its indices are removed for good. The log keeps
        that a request was made, and carried out or withdrawn, with both times, and
        still verifies.
        The weights file keeps the positions of all forgotten examples, without saying
        who asked: no later run may train on them. The name is free again. Other files
        are not changed: in the directory of a run, ``record.json`` lists the positions
        and the names of the run's requests, and ``guarantee_to_show.json`` and reports
        have these names.

        Args:
            request_id: The request's name.
            reason: Why, to be stored with the redaction.

        Raises:
            ValueError: If there is no such request, or it is still pending.
            OSError: If it could not be written.
        """
        name = plain_name("request_id", request_id)
        found = self._requests()
        number = self._number_of(name, found)
        expect(
            number not in found.still_open,
            "request_id",
            name,
            "must name a request that was carried out or withdrawn",
            "It is still pending. Carry it out first, with process or 'opacus-pi "
            "unlearn --log', or withdraw it, with withdraw or 'opacus-pi log "
            "withdraw'.",
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
        with locked(self.log.path):
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

        A request is carried out once and for good, so nothing is run if it is known
        that the unlearner's ledger is of another model: no bound could be claimed. To
        go on without a bound, make the unlearner without a ledger.

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
                both ``evaluate`` and ``evaluation_of`` are given, or no recorded run
                left the weights of the unlearner's model. What was carried out before
                it stays; the request in question stays pending.
            RuntimeError: If another process is carrying out requests.
            TypeError: If an option has an unknown name.
        """
        _require_one_evaluation(evaluation_of, options)
        self._require_length(train_set)
        require_states(checkpoints, deletion_policy)
        if checkpoints is not None:
            options |= {"checkpoints": checkpoints, "deletion_policy": deletion_policy}
        carry_out = unlearner.unlearn if checkpoints is None else unlearner.rewind
        # also if nothing is pending
        inspect.signature(carry_out).bind(train_set, (), **options)
        with locked(self.log.path):
            found = self._requests(fingerprint(train_set))
            honoured, stored = self._resume(unlearner, found)
            results = self._finish(found, honoured, stored, unlearner, train_set)
            pending = {n: r for n, r in found.pending.items() if n not in honoured}
            for group in _groups(pending, together):
                rows = np.unique([i for one in group.values() for i in one.indices])
                if checkpoints is None and self._has_forgotten(rows):
                    facts = {"found": "forgotten by earlier runs"}
                    self._log_done([*group], facts, _left(train_set, unlearner))
                    honoured |= set(group)
                    continue
                if checkpoints is None:
                    _require_recorded_weights(unlearner)
                if evaluation_of is not None:
                    options["evaluate"] = evaluation_of(rows)
                result = carry_out(train_set, rows, **options)
                honoured |= set(group)
                hashes = [found.hashes[number] for number in honoured]
                run = StoredRun.of(result, [found.hashes[n] for n in group])
                facts, left = run_facts(result), _left(train_set, unlearner)
                payload_text(facts)  # what the log would refuse is found before
                store_weights(self.weights_path, unlearner, hashes, run)
                self._log_done([*group], facts, left)
                names = [request.request_id for request in group.values()]
                record = {**result.record, "requests": names}
                results.append(replace(result, record=record))
        return results

    def _require_length(self, train_set: Dataset[Any]) -> None:
        """Refuse a training set of another length."""
        expect(
            size_of(train_set) == self.num_examples,
            "train_set",
            f"{size_of(train_set)} examples",
            f"must have {self.num_examples} examples, as this log's training set has",
            f"Pass the data set that the model was trained on. {IF_ERASED}",
        )

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

    def _finish(
        self,
        found: Requests,
        honoured: set[int],
        stored: StoredWeights,
        unlearner: Unlearner,
        train_set: Any,
    ) -> list[UnlearningResult]:
        """Log the run after whose weights were stored the process was killed, if any.

        The order matters: weights, then log. The weights list the requests of their
        run and what it returned, so that the log gets the entry that is missing. In
        the other order it would promise weights that do not exist.

        Args:
            found: The requests of the log.
            honoured: Those that the stored weights honour.
            stored: The content of their file.
            unlearner: Has taken the weights.
            train_set: The training set.

        Returns:
            The result of that run; nothing if every run was logged, or an earlier
            release stored the weights.
        """
        finished = [number for number in found.pending if number in honoured]
        if not finished:
            return []
        result, run = None, stored.run
        if run is not None and run.requests == {found.hashes[n] for n in finished}:
            result = _result_of(run, found, stored, unlearner.model)
        facts: dict[str, Any] = {"found": "in the stored weights"}
        if result is not None:
            facts = run_facts(result)
            del facts["run"]["requests"]  # the names, which are not logged twice
        self._log_done(finished, facts, _left(train_set, unlearner))
        return [] if result is None else [result]

    def last_result(
        self, model: nn.Module, request_ids: Iterable[str | int] = ()
    ) -> UnlearningResult | None:
        """Return what the last run returned, if it was lost or is wanted for a request.

        The weights beside the log honour every request that was carried out, and the
        guarantee of the last run covers all of them. So this is also the result to show
        for a request of an earlier run, or one that needed no run.

        Args:
            model: The trained model, or one with the stored weights; it is copied.
            request_ids: More requests that were carried out, which the record then
                names beside those of the run. Names of redacted requests are not known.

        Returns:
            The result, as ``process`` returned it; None if nothing was carried out yet,
            or an earlier release did it.

        Raises:
            ValueError: As ``resume``, or if a request was not carried out.
            RuntimeError: If another process is carrying out requests.
        """
        with locked(self.log.path):
            found = self._requests()
            stored = stored_weights(self.weights_path, self.num_examples)
            honoured_by(stored, found, self.weights_path)  # refuses those of another
        names = {plain_name("request_ids", name) for name in request_ids}
        gone = [one for n, one in found.submitted.items() if n in found.withdrawn]
        withdrawn = names & {one.request_id for one in gone if one is not None}
        expect(
            not withdrawn,
            "request_ids",
            sorted(withdrawn)[:5],
            "must name requests that were carried out",
            "They were withdrawn, so nothing was forgotten for them. An export of the "
            "log shows the withdrawal.",
        )
        done = [one for n, one in found.submitted.items() if n in found.done]
        others = sorted(names - {one.request_id for one in done if one is not None})
        expect(
            not others,
            "request_ids",
            others[:5],
            "must name requests that were carried out",
            "Call process first.",
        )
        if stored.run is None:
            return None
        result = _result_of(stored.run, found, stored, model, names)
        load_weights_(result.model, stored, self.weights_path)
        return result

    def _log_done(
        self, numbers: list[int], facts: dict[str, Any], remains: dict[str, Any]
    ) -> None:
        """Log that requests were carried out, and by which weights.

        What remains is logged first: if the process is killed between the two entries,
        the requests are still pending, and the second entry is made then.
        """
        digest = sha256_of(self.weights_path)
        payload = {"requests": numbers, "weights_sha256": digest, **facts}
        last = self.log.last
        if last is None or (last.kind, last.payload) != (REMAINING, remains):
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

    def _resume(
        self, unlearner: Unlearner, found: Requests
    ) -> tuple[set[int], StoredWeights]:
        """Load the stored weights, if any; return the requests they honour, and them.

        The unlearner's list of forgotten examples and its history are extended too, so
        that its next guarantee covers the earlier runs.
        """
        stored = stored_weights(self.weights_path, self.num_examples)
        honoured = honoured_by(stored, found, self.weights_path)
        if honoured:
            load_weights_(unlearner.model, stored, self.weights_path)
            forgotten = np.array(stored.forgotten, dtype=np.int64)
            unlearner.forgotten = np.union1d(unlearner.forgotten, forgotten)
            exactly = np.array(stored.forgotten_exactly, dtype=np.int64)
            unlearner.forgotten_exactly = np.union1d(
                unlearner.forgotten_exactly, exactly
            )
            unlearner.history = unlearner.history.joined(stored.history)
        return honoured, stored


def withdraw_first(requests: DeletionRequests, request_id: str) -> str:
    """Return what to do about a request if it was a mistake; empty if it is done.

    Args:
        requests: The requests of the log.
        request_id: The name of a request, which the caller wants to use for another.
    """
    pending = request_id in {request.request_id for request in requests.pending}
    return pending * (
        f" The earlier request {request_id} is pending, and the next run carries it "
        "out. If it is a mistake, withdraw it: DeletionRequests.withdraw, or "
        f"'opacus-pi log withdraw {requests.log.path} --request-id {request_id}'."
    )


def _require_recorded_weights(unlearner: Unlearner) -> None:
    """Refuse a run whose ledgers are known to be of another model than the unlearner's.

    Args:
        unlearner: Has taken the weights beside the log, if there are any.
    """
    runs = runs_in(unlearner.ledger)
    require(
        not left_other_weights(runs, unlearner.model, unlearner.history),
        "No recorded run left the weights of the unlearner's model: it is another one, "
        "or was loaded or changed after training. So the ledger says nothing of it, "
        "and no bound could be claimed. Nothing was run, and the requests stay "
        "pending.",
        "Pass the ledger of the training that left these weights, or make the "
        "unlearner without a ledger; the guarantee is then empirical.",
    )


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


def _result_of(
    run: StoredRun,
    found: Requests,
    stored: StoredWeights,
    model: nn.Module,
    more: Collection[str] = (),
) -> UnlearningResult:
    """Return the result of a stored run again.

    Args:
        run: The run.
        found: The requests of the log, which name the examples.
        stored: The content of the weights file.
        model: Is copied, with its weights.
        more: Names of requests that the result is about besides those of the run.
    """
    own = {number for number, h in found.hashes.items() if h in run.requests}
    requests = [
        request
        for number, request in found.submitted.items()
        if request is not None and (number in own or request.request_id in more)
    ]
    return run.result(
        copy.deepcopy(model).eval(),
        (row for request in requests for row in request.indices),
        [request.request_id for request in requests],
        forgotten=stored.forgotten,
        exactly=stored.forgotten_exactly,
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
