"""Compare a file of weights with the weights that a run of unlearning left.

A statement names the released file by its SHA-256. That is worth something only if the
file holds the weights that the statement is about, whatever format it has. So the
tensors are compared, by the hash that the record of the run has.
"""

import os
from pathlib import Path
from typing import Any

from opacus_pi._validate import require
from opacus_pi.files.arrays_file import named_kind
from opacus_pi.files.kinds import KINDS, UNLEARNED_WEIGHTS
from opacus_pi.files.state_dict_file import read_state_dict
from opacus_pi.files.weights_file import read_weights
from opacus_pi.models.stored_names import with_names_of, without_wrapper
from opacus_pi.models.weights_name import name_of_state, weights_name
from opacus_pi.unlearning.honouring_weights import sha256_of

__all__ = ["hashes_of_weights", "require_weights_of"]

_REMEDY = (
    "Pass weights.safetensors of the run's directory, or a file with "
    "result.model.state_dict()."
)


def require_weights_of(path: str | os.PathLike[str], result: Any) -> str:
    """Return the SHA-256 of a file that holds the weights of a result; refuse others.

    Args:
        path: The file, of safetensors or ``torch.save``.
        result: An ``UnlearningResult``, or a ``SavedResult``, which has no model.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds other weights or no weights, if the record does not name
            the weights, or if the file is the one beside a deletion log.
    """
    place, model = Path(path), getattr(result, "model", None)
    expected = result.record.get("unlearned_weights") or (
        "" if model is None else weights_name(model)
    )
    require(
        bool(expected),
        "weights_path cannot be compared with the weights of the result, because an "
        "earlier release wrote its record, which does not name them.",
        "Leave weights_path out.",
    )
    _require_no_private_facts(place)
    try:
        state = read_state_dict(place)
    except ValueError as error:
        raise ValueError(
            f"weights_path must be a file of weights, got {place}, which cannot be "
            f"read as one. {_REMEDY}"
        ) from error
    forms = [state, without_wrapper(state)]
    if model is not None:
        forms.append(with_names_of(model, state))
    found = [name_of_state(form) for form in forms]
    require(
        expected in found,
        f"weights_path {place} does not hold the weights that the run left: those of "
        f"the file are {found[1]}, and those of the result {expected}.",
        _REMEDY,
    )
    return sha256_of(place)


def hashes_of_weights(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file of weights and of the weights in it, by their names.

    Args:
        path: The file.

    Returns:
        ``weights_file`` and ``weights``, as a statement about a deletion has them;
        empty if the file cannot be read as weights.
    """
    try:
        state = without_wrapper(read_state_dict(path))
    except (ValueError, MemoryError, OSError, RuntimeError):
        return {}
    return {"weights_file": sha256_of(path), "weights": name_of_state(state)}


def _require_no_private_facts(path: Path) -> None:
    """Refuse the weights beside a deletion log, whose file is for its owner only."""
    kind = KINDS.get(named_kind(path) or "")
    if kind is None or kind.name != UNLEARNED_WEIGHTS.name:
        return
    facts = read_weights(path, UNLEARNED_WEIGHTS)[1]
    require(
        "forgotten" not in facts,
        f"weights_path {path} holds the weights beside a deletion log. That file lists "
        "the forgotten examples, so it must not be given to others.",
        _REMEDY,
    )
