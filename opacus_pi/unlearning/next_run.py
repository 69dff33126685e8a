"""What the next run for a deletion log will forget, for a plan that agrees with it.

``opacus-pi unlearn --log`` starts from the weights that honour what was carried out,
and forgets all pending requests in one run. What the run may claim depends on both: the
examples that were forgotten, with the history of these weights, and the pending ones.

>>> import tempfile
>>> from opacus_pi.unlearning.requests import DeletionRequests
>>> path = tempfile.mkdtemp() + "/deletions.db"
>>> _ = DeletionRequests(path, num_examples=64).submit("2026-001", indices=[3, 17])
>>> found = next_run(path, 64)
>>> [request.request_id for request in found.pending], found.examples, found.forgotten
(['2026-001'], array([ 3, 17]), array([], dtype=int64))
"""

import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import require
from opacus_pi.unlearning.history import History
from opacus_pi.unlearning.honoured_requests import requests_with_weights
from opacus_pi.unlearning.honouring_weights import weights_path_of
from opacus_pi.unlearning.requests import DeletionRequest

__all__ = ["NextRun", "next_run"]


def _no_examples() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class NextRun:
    """From where the next run starts, and what it forgets.

    Args:
        pending: The requests that it carries out, oldest first.
        forgotten: int64, sorted: the examples that its first weights have forgotten.
        forgotten_exactly: Those of them that an exact rewind has forgotten.
        history: The runs that these weights went through.
    """

    pending: tuple[DeletionRequest, ...] = ()
    forgotten: NDArray[np.int64] = field(default_factory=_no_examples)
    forgotten_exactly: NDArray[np.int64] = field(default_factory=_no_examples)
    history: History = History()

    @property
    def examples(self) -> NDArray[np.int64]:
        """The examples of the pending requests, int64 and sorted."""
        named = {i for request in self.pending for i in request.indices}
        return np.array(sorted(named), dtype=np.int64)


def next_run(
    path: str | os.PathLike[str], num_examples: int, data_set: str | None = None
) -> NextRun:
    """Return what the next run for a log will do. No file is changed.

    Args:
        path: The deletion log.
        num_examples: Length of the training set.
        data_set: Its fingerprint; None: not known.

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If the log or the weights are damaged, do not belong together, or
            are about another training set; or if requests were carried out, and the
            weights that honour them are missing.
    """
    found, stored = requests_with_weights(path, num_examples, data_set)
    weights = weights_path_of(os.path.realpath(path))
    require(
        not found.done or weights.exists(),
        f"{weights} does not exist. It has the weights that honour the "
        f"{len(found.done)} requests that were carried out.",
        "Restore it from a copy.",
    )
    return NextRun(
        tuple(found.pending.values()),
        np.array(stored.forgotten, dtype=np.int64),
        np.array(stored.forgotten_exactly, dtype=np.int64),
        stored.history,
    )
