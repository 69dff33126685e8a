"""One reader of a format, and the edits of a safetensors file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.fuzz.mutations import (
    NUMPY,
    TORCH,
    edited,
    other_length,
)

NUMPY_TYPES = {name: text for name, (text, _) in NUMPY.items()}


TORCH_TYPES = {name: f"torch.{text}" for name, text in TORCH.items()}


class Refused(Exception):
    """A clear answer that is no exception of the library's own."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Args:
        original: The good file.
        read: From a path.
        check: Asserts the invariants of what was read.
        equal: Whether something read is the original.
        edit: ``(content, chance, seal) -> content``: says something else.
        name: Of the file.
    """

    original: bytes
    read: Callable[[Any], Any]
    check: Callable[[Any], None]
    equal: Callable[[Any], bool]
    edit: Callable[..., bytes]
    name: str = "file"


# ------------------------------------------------------------------ all of them
def safetensors_edit(types):
    def edit(content, chance, *, seal):
        if not seal and chance.random() < 0.1:
            return other_length(content, chance)
        return edited(content, types, chance, seal=seal)

    return edit
