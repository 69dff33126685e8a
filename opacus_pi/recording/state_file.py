"""Files of saved training states, read without running code from them.

A state is a dict whose leaves are tensors, numbers, strings and None, such as the state
dicts of models and optimizers. The file is one of ``torch.save``, with a checksum over
all leaves and their places.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opacus_pi._validate import expect
from opacus_pi.files.atomic_file import replacing
from opacus_pi.files.checksummed_state import verified_state, with_checksum
from opacus_pi.files.regular_file import require_regular
from opacus_pi.files.torch_file import read_torch_file, require_bounded

STATE_FORMAT = "opacus_pi.TrainingState.v1"
_RESTORE = "Restore it from a copy, or rewind to an earlier state."


def write_state(path: Path, state: Mapping[str, Any]) -> int:
    """Write a state to a file that only its owner can read, in one step.

    Args:
        path: The file.
        state: Nested dicts, lists and tuples of tensors, numbers and strings.

    Returns:
        Length of the file in bytes.

    Raises:
        ValueError: If it holds objects of other types.
    """
    content = copied(state)
    checksum = with_checksum(dict(_leaves("", content)))["checksum"]
    with replacing(path) as file:
        whole = {"format": STATE_FORMAT, "checksum": checksum, "state": content}
        torch.save(whole, file)  # what weights_only=True accepts
    return path.stat().st_size


def read_state(path: Path) -> dict[str, Any]:
    """Read the state that ``write_state`` wrote.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, edited, or something else.
    """
    try:
        require_regular(path)
    except FileNotFoundError as error:
        text = f"The saved state {path} does not exist. {_RESTORE}"
        raise FileNotFoundError(text) from error
    except (OSError, ValueError) as error:
        text = f"The saved state {path} cannot be read ({error}). {_RESTORE}"
        raise ValueError(text) from error
    try:
        require_bounded(path)
    except ValueError as error:
        raise ValueError(f"{error}. {_RESTORE}") from error
    try:
        found = read_torch_file(path, map_location="cpu", remedy=_RESTORE)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} must be a saved state, got a damaged file ({error}). {_RESTORE}"
        ) from error
    expect(
        isinstance(found, dict) and found.get("format") == STATE_FORMAT,
        "checkpoints",
        path,
        "must be a state that Recorder(checkpoints=...) saved",
        _RESTORE,
    )
    state = found.get("state")
    leaves = {**dict(_leaves("", state)), "checksum": found.get("checksum")}
    verified_state(leaves, str(path))
    content: dict[str, Any] = state
    return content


def copied(value: Any) -> Any:
    """Return a copy of a state whose tensors are on the CPU and own their memory.

    Args:
        value: A state, or a part of one.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of a state with a text that says where it is."""
    if isinstance(value, dict):
        yield f"{place}{{}}", len(value)
        for key, item in value.items():
            yield from _leaves(f"{place}/{key!r}", item)
    elif isinstance(value, list | tuple):
        yield f"{place}[]", f"{type(value).__name__} of {len(value)}"
        for i, item in enumerate(value):
            yield from _leaves(f"{place}/{i}", item)
    else:
        expect(
            isinstance(value, Tensor | bool | int | float | str | None),
            f"the training state at {place or '/'}",
            type(value).__name__,
            "must be a tensor, a number or a text",
            "Train with an optimizer whose state_dict holds only these.",
        )
        yield place, value
