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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.data import Dataset

from opacus_pi._validate import distinct_indices, expect
from opacus_pi.atomic_file import replace_file
from opacus_pi.unlearning.deletion_record import DeletionRecord, sync_directory
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult

_KIND = "opacus_pi.UnlearnedWeights.v1"


@dataclass(frozen=True)
class DeletionRequest:
    """One request.

    Args:
        request_id: The caller's name for it, unique.
        indices: The examples to forget, sorted.
    """

    request_id: str
    indices: tuple[int, ...]


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
        known = _request(entry)
        expect(
            known.indices == rows,
            "request_id",
            request_id,
            "to name one request only; it was submitted for other rows",
            "Use a new name.",
        )
        return known

    @property
    def pending(self) -> list[DeletionRequest]:
        """Requests that are not yet done, oldest first."""
        entries = self.record.entries()
        done = _done_ids(entries)
        requests = [_request(e) for e in _of_kind(entries, "request")]
        return [r for r in requests if r.request_id not in done]

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
            len(train_set) == self.num_examples,
            "train_set",
            f"{len(train_set)} examples",
            f"to have the {self.num_examples} that the requests speak of",
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
        state = {
            name: value.detach().cpu().clone().contiguous()
            for name, value in unlearner.model.state_dict().items()
        }
        facts = {
            "kind": _KIND,
            "honoured": json.dumps(sorted(honoured)),
            "forgotten": json.dumps(unlearner.forgotten.tolist()),
        }
        replace_file(self.weights_path, save(state, metadata=facts))
        sync_directory(self.weights_path.parent)

    def _facts(self) -> dict[str, str]:
        """What the stored weights say about themselves; empty if there are none."""
        if not self.weights_path.exists():
            return {}
        with safe_open(self.weights_path, framework="pt") as file:
            facts = file.metadata() or {}
        expect(
            facts.get("kind") == _KIND,
            "weights_path",
            self.weights_path,
            f"to hold {_KIND}",
            "Move the file away: its name belongs to the deletion record.",
        )
        return facts

    def _honoured(self) -> set[str]:
        """Names of the requests that the stored weights honour."""
        return set(json.loads(self._facts().get("honoured", "[]")))

    def _resume(self, unlearner: Unlearner) -> set[str]:
        """Give the unlearner the stored weights, if there are any; what they honour."""
        honoured = self._honoured()
        self._check_weights(honoured)
        if honoured:
            with safe_open(self.weights_path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
            unlearner.model.load_state_dict(state)
            forgotten = np.array(json.loads(self._facts()["forgotten"]), dtype=np.int64)
            unlearner.forgotten = np.union1d(unlearner.forgotten, forgotten)
        return honoured

    def _check_weights(self, honoured: set[str]) -> None:
        """Refuse weights that the record does not know or that know less than it."""
        entries = self.record.entries()
        recorded = _done_ids(entries)
        submitted = {e["body"]["id"] for e in _of_kind(entries, "request")}
        good = recorded <= honoured <= submitted
        if good and recorded == honoured and recorded:
            digest = _of_kind(entries, "done")[-1]["body"]["weights_sha256"]
            good = digest == _sha256(self.weights_path)
        expect(
            good,
            "weights_path",
            self.weights_path,
            f"to be the weights that honour the {len(recorded)} recorded request(s)",
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
            "to be one of the two",
            "Name rows or a user.",
        )
        if user is not None:
            expect(
                user in self.rows_of,
                "user",
                user,
                f"to be one of the {len(self.rows_of)} users of rows_of",
                "Pass rows_of with this user's rows.",
            )
            indices = self.rows_of[user]
        return distinct_indices("indices", indices, self.num_examples)


def _of_kind(entries: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The entries of one kind."""
    return [e for e in entries if e["kind"] == kind]


def _named(entries: list[dict[str, Any]], request_id: str) -> dict[str, Any] | None:
    """The entry that took down a request, or None."""
    requests = _of_kind(entries, "request")
    return next((e for e in requests if e["body"]["id"] == request_id), None)


def _done_ids(entries: list[dict[str, Any]]) -> set[str]:
    """Names of the requests that are recorded as carried out."""
    return {i for e in _of_kind(entries, "done") for i in e["body"]["ids"]}


def _request(entry: Mapping[str, Any]) -> DeletionRequest:
    """The request that an entry took down."""
    return DeletionRequest(entry["body"]["id"], tuple(entry["body"]["indices"]))


def _sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
