"""The weights that honour the requests of a log, and what their file says about them.

Besides the weights, the file holds which requests they honour, which examples they have
forgotten and by what kind of runs, and what the last run returned. It is replaced in
one step, so that the weights and these facts always belong together.

That is what makes ``requests`` safe against crashes. If the facts were in the log and
the weights in a file, a crash between the two writes would leave a request that is
marked as done but not honoured, or one that is carried out twice.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from opacus_pi._validate import expect, require
from opacus_pi.files.kinds import UNLEARNED_WEIGHTS
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.weights_file import read_weights, write_weights
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning.history import History, history_from_json
from opacus_pi.unlearning.stored_run import StoredRun, run_from_json
from opacus_pi.unlearning.unlearner import Unlearner


@dataclass(frozen=True)
class StoredWeights:
    """The weights that honour requests, and what their file says about them.

    Args:
        state: The weights by name.
        entries: Hashes of the entries of the requests that they honour.
        names: In files of earlier releases, the names of those requests instead.
        forgotten: Positions in the training set, sorted.
        forgotten_exactly: Those that an exact rewind has forgotten. In files of earlier
            releases, which do not say it, all of ``forgotten``, so that no later run
            weakens a request.
        history: The runs that the weights went through.
        run: What the last run returned; None in files of earlier releases.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    entries: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    forgotten: tuple[int, ...] = ()
    forgotten_exactly: tuple[int, ...] = field(default=(), kw_only=True)
    history: History = field(default_factory=History)
    run: StoredRun | None = field(default=None, kw_only=True)


def weights_path_of(path: str | os.PathLike[str]) -> Path:
    """Return where the weights that honour a log's requests are stored.

    It is the log's name with ``.safetensors`` after it, so that a copy or a backup of
    both is easily made.

    Args:
        path: The log.
    """
    return Path(f"{os.fspath(path)}.safetensors")


def store_weights(
    path: Path, unlearner: Unlearner, entries: Iterable[str], run: StoredRun
) -> None:
    """Write an unlearner's weights and what they honour in one atomic step.

    The log has the hash of the file, and others may see it, with the weights. The file
    has random bytes, so that what it says besides cannot be found by trying.

    Args:
        path: The file.
        unlearner: Its model, what it has forgotten, and its history are stored.
        entries: Hashes of the entries of the requests that the weights honour.
        run: What the last run returned.
    """
    facts = {
        "random": secrets.token_hex(32),
        "run": run.to_json(),
        "honoured_entries": json.dumps(sorted(entries)),
        "forgotten": json.dumps(unlearner.forgotten.tolist()),
        "forgotten_exactly": json.dumps(unlearner.forgotten_exactly.tolist()),
        "history": unlearner.history.text,
    }
    write_weights(path, UNLEARNED_WEIGHTS, unlearner.model.state_dict(), facts)


def stored_weights(path: Path, num_examples: int) -> StoredWeights:
    """Read the stored weights and the facts in their file.

    Args:
        path: The file.
        num_examples: Length of the training set, to check the positions.

    Returns:
        The content of the file. If there is none, an empty one: nothing is honoured.

    Raises:
        ValueError: If the file is damaged, or does not say what it honours.
    """
    if not path.exists():
        return StoredWeights()
    state, facts = read_weights(path, UNLEARNED_WEIGHTS)
    by_hash = "honoured_entries" in facts
    honoured = _list_from(facts.get("honoured_entries" if by_hash else "honoured"))
    rows = _list_from(facts.get("forgotten"))
    exactly = _list_from(facts.get("forgotten_exactly", facts.get("forgotten")))
    history = history_from_json(facts.get("history"))
    run = run_from_json(facts["run"]) if "run" in facts else None
    expect(
        history is not None
        and (run is not None or "run" not in facts)
        and all(isinstance(name, str) for name in honoured)
        and all(type(row) is int and 0 <= row < num_examples for row in rows)
        and all(type(row) is int for row in exactly)
        and set(exactly) <= set(rows),
        "weights_path",
        path,
        "must be a file that lists the requests that its weights honour, the "
        "methods, and the forgotten examples, with indices from 0 to "
        f"{num_examples - 1}",
        "Restore the file from a copy.",
    )
    entries, names = (honoured, ()) if by_hash else ((), honoured)
    return StoredWeights(
        *(state, frozenset(entries), frozenset(names), tuple(rows)),
        cast(History, history),
        forgotten_exactly=tuple(exactly),
        run=run,
    )


def _list_from(text: str | None) -> list[Any]:
    """Read a list from JSON; return a list that fails every check for other input.

    ``None`` is neither a name nor a position, so the caller needs only one check, with
    one message, for content that is missing, damaged or wrong.

    Args:
        text: JSON text, or None if the file does not have it.
    """
    try:
        found = plain_json(text or "")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list) else [None]


def load_weights_(model: nn.Module, stored: StoredWeights, path: Path) -> None:
    """Load stored weights into a model, all of them or none.

    ``load_state_dict`` alone would convert other types silently, and would have changed
    some weights before it reports that others do not fit. A model with other weights
    than those from which the first run started is another one: what it is asked to
    forget would be forgotten by the model of the log instead. The files of rewinds and
    of earlier releases do not say from which weights that was.

    Args:
        model: The model as it was trained, or with the stored weights. Changed in
            place, but only after every name, shape and type was compared.
        stored: The content of the weights file.
        path: The file, for the message.

    Raises:
        ValueError: If the weights do not fit the model, or are of another one.
    """
    own, state = model.state_dict(), stored.state
    differing = {
        name
        for name in {*own, *state}
        if name not in own
        or name not in state
        or (own[name].shape, own[name].dtype) != (state[name].shape, state[name].dtype)
    }
    require(
        not differing,
        f"The weights in {path} do not fit the unlearner's model: they differ in "
        f"{', '.join(sorted(differing)[:5])}.",
        "Make the unlearner from the model that the requests are about.",
    )
    known = {stored.history.trained, stored.history.left}
    require(
        not stored.history.trained or weights_name(model) in known,
        f"The unlearner's model has neither the weights from which the requests in "
        f"{path} started, nor those that honour them, so the log is of another model.",
        "Pass the model that the log is about, as it was trained, or another log.",
    )
    model.load_state_dict(state)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
