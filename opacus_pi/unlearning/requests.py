"""Deletion requests: taken down at once, carried out once, in order, across crashes.

A request counts from the moment ``submit`` returns. ``process`` unlearns what is
pending, stores the new weights together with the numbers of the requests that they
honour in one atomic file, and only then writes "done": whatever moment a crash picks,
the weights on the disk say which requests they have already forgotten.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.weights_file import read_weights, write_weights
from opacus_pi.models.batches import size_of
from opacus_pi.unlearning.deletion_record import DeletionRecord, sync_directory
from opacus_pi.unlearning.history import History, history_of
from opacus_pi.unlearning.request_entries import (
    DeletionRequest,
    Requests,
    request_of,
    requests_of,
)
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult

__all__ = ["DeletionRequest", "DeletionRequests"]


class DeletionRequests:
    """The requests about one model, kept in two files next to each other.

    Args:
        path: The deletion record; made if missing. The weights that honour it are
            stored under the same name with ``.safetensors`` added.
        num_examples: Length of the training set.
        rows_of: Each user's rows of the training set, for requests by user.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_examples: int,
        rows_of: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        self.record = DeletionRecord(path)
        self.weights_path = Path(f"{os.fspath(path)}.safetensors")
        self.num_examples = num_examples
        self.rows_of = rows_of or {}

    def submit(
        self,
        request_id: str,
        *,
        indices: ArrayLike | None = None,
        user: str | None = None,
    ) -> DeletionRequest:
        """Take down a request; it is on the disk when this returns.

        Submitting the same request again changes nothing, so after a crash a caller
        may simply repeat it.

        Args:
            request_id: A name for the request.
            indices: The rows to forget, or
            user: the user whose rows to forget.

        Returns:
            The request.

        Raises:
            ValueError: If not exactly one of indices and user is given, the rows are
                bad, the user is unknown, or the name stands for another request.
        """
        rows = tuple(self._rows(indices, user).tolist())
        body = {"id": request_id, "indices": rows}
        if user is not None:
            body["user"] = user
        entry = self.record.append_unless(
            lambda entries: _named(entries, request_id), "request", body
        )
        known = request_of(entry, self.num_examples)
        expect(
            known.indices == rows,
            "request_id",
            request_id,
            "must name one request only",
            "It was submitted for other rows before: use a new name.",
        )
        return known

    @property
    def pending(self) -> list[DeletionRequest]:
        """Requests that are not yet done, oldest first."""
        found = self._requests()
        return [r for n, r in found.submitted.items() if n not in found.done]

    def resume(self, unlearner: Unlearner) -> None:
        """Bring an unlearner to where the requests stand; ``process`` does it too.

        It takes the stored weights, if requests were honoured before, and knows what
        was forgotten and how: only then does its ``plan`` speak of the run that would
        follow, and its guarantee of all runs before it, by whatever process and method.

        Args:
            unlearner: Made from the trained model.

        Raises:
            ValueError: If the stored weights are not those of the record, or do not
                fit the model.
            RuntimeError: If another process is carrying out requests.
        """
        with self._alone():
            self._resume(unlearner)

    def process(
        self,
        unlearner: Unlearner,
        train_set: Dataset[Any],
        *,
        together: bool = False,
        **options: Any,
    ) -> list[UnlearningResult]:
        """Carry out what is pending, each request once.

        Args:
            unlearner: Made from the trained model. If requests were honoured before,
                it continues from the stored weights.
            train_set: The training set.
            together: Forget all pending requests in one run, instead of one by one.
            **options: ``num_epochs``, ``evaluate``, ``batch_size`` of ``unlearn``.

        Returns:
            The result of each run, none if nothing was pending.
        """
        expect(
            size_of(train_set) == self.num_examples,
            "train_set",
            f"{size_of(train_set)} examples",
            f"must have the {self.num_examples} that the requests speak of",
            "Pass the set that the model was trained on.",
        )
        with self._alone():
            honoured = self._resume(unlearner)
            finished = [r for r in self.pending if r.request_id in honoured]
            if finished:  # a crash came between the weights and the record
                self._done(finished, {"found": "in the stored weights"})
            pending = self.pending
            groups = [pending] if together and pending else [[r] for r in pending]
            return [self._carry_out(unlearner, train_set, g, options) for g in groups]

    def _carry_out(
        self,
        unlearner: Unlearner,
        train_set: Dataset[Any],
        group: list[DeletionRequest],
        options: Mapping[str, Any],
    ) -> UnlearningResult:
        """Unlearn one group, store the weights, then say so."""
        rows = np.unique(np.concatenate([r.indices for r in group]))
        result = unlearner.unlearn(train_set, rows, **options)
        honoured = self._honoured() | {r.request_id for r in group}
        self._store(unlearner, honoured)
        self._done(group, {"run": result.record, "guarantee": result.guarantee.kind})
        return result

    def _done(self, group: list[DeletionRequest], facts: dict[str, Any]) -> None:
        """Record that requests were carried out, and by which weights."""
        facts = {
            "ids": [r.request_id for r in group],
            "weights_sha256": _sha256(self.weights_path),
            **facts,
        }
        self.record.append("done", facts)

    def _store(self, unlearner: Unlearner, honoured: set[str]) -> None:
        """Write weights and what they honour in one atomic step."""
        facts = {
            "honoured": json.dumps(sorted(honoured)),
            "forgotten": json.dumps(unlearner.forgotten.tolist()),
            "history": unlearner.history.text,
        }
        state = unlearner.model.state_dict()
        write_weights(self.weights_path, UNLEARNED_WEIGHTS, state, facts)
        sync_directory(self.weights_path.parent)

    def _requests(self) -> Requests:
        """What the record says."""
        return requests_of(self.record.entries(), self.num_examples)

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, list[Any]], History]:
        """The stored weights, what they honour and forgot, and the runs they are of.

        Raises:
            ValueError: If the file is not whole, or says nothing of the kind.
        """
        if not self.weights_path.exists():
            return {}, {"honoured": [], "forgotten": []}, History()
        state, facts = read_weights(self.weights_path, UNLEARNED_WEIGHTS)
        lists = {name: _listed(facts.get(name)) for name in ("honoured", "forgotten")}
        rows, history = lists["forgotten"], history_of(facts.get("history"))
        expect(
            history is not None
            and all(isinstance(name, str) for name in lists["honoured"])
            and all(type(row) is int and 0 <= row < self.num_examples for row in rows),
            "weights_path",
            self.weights_path,
            f"must name the requests it honours, which of {self.num_examples} examples "
            "it forgot, and how",
            "Restore the file from a copy.",
        )
        return state, lists, cast(History, history)

    def _honoured(self) -> set[str]:
        """Names of the requests that the stored weights honour."""
        return set(self._stored()[1]["honoured"])

    def _resume(self, unlearner: Unlearner) -> set[str]:
        """Give the unlearner the stored weights, if there are any; what they honour."""
        state, lists, history = self._stored()
        honoured = set(lists["honoured"])
        self._check_weights(honoured)
        if honoured:
            _load_(unlearner.model, state, self.weights_path)
            forgotten = np.array(lists["forgotten"], dtype=np.int64)
            unlearner.forgotten = np.union1d(unlearner.forgotten, forgotten)
            unlearner.history = unlearner.history.joined(history)
        return honoured

    def _check_weights(self, honoured: set[str]) -> None:
        """Refuse weights that the record does not know or that know less than it."""
        found = self._requests()
        good = found.done <= honoured <= set(found.submitted)
        if good and found.done == honoured and found.done:
            good = found.weights_sha256 == _sha256(self.weights_path)
        expect(
            good,
            "weights_path",
            self.weights_path,
            f"must honour the {len(found.done)} recorded request(s)",
            "Restore the file from a copy; without it they must be carried out again.",
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process carries out requests about this model meanwhile."""
        with open(f"{self.record.path}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(
                    f"{self.record.path}: another process is carrying out requests. "
                    "Wait until it is done."
                ) from error
            yield

    def _rows(self, indices: ArrayLike | None, user: str | None) -> NDArray[np.int64]:
        """The rows that a request names."""
        expect(
            (indices is None) != (user is None),
            "indices, user",
            f"{'both' if indices is not None else 'neither'}",
            "must be one of the two",
            "Name rows or a user.",
        )
        if user is not None:
            expect(
                user in self.rows_of,
                "user",
                user,
                f"must be one of the {len(self.rows_of)} users of rows_of",
                "Pass rows_of with this user's rows.",
            )
            indices = self.rows_of[user]
        return distinct_indices("indices", cast(ArrayLike, indices), self.num_examples)


def _named(entries: list[dict[str, Any]], request_id: str) -> dict[str, Any] | None:
    """The entry that took down a request, or None."""
    requests = (e for e in entries if e["kind"] == "request")
    return next((e for e in requests if e["body"].get("id") == request_id), None)


def _listed(text: str | None) -> list[Any]:
    """A list from its JSON; of anything else something that no list holds."""
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list) else [None]


def _load_(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a model stored weights, all of them or none."""
    own = model.state_dict()
    differing = {
        name
        for name in {*own, *state}
        if name not in own
        or name not in state
        or (own[name].shape, own[name].dtype) != (state[name].shape, state[name].dtype)
    }
    expect(
        not differing,
        "weights_path",
        path,
        "must fit the unlearner's model",
        f"These tensors differ: {sorted(differing)[:5]}. Make the unlearner "
        "from the model that the requests are about.",
    )
    model.load_state_dict(state)


def _sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
