"""Ignore warnings for a while, without making Python repeat those that were shown.

Python shows a warning once for each place in the code, and notes it in the module of
that place. ``warnings.catch_warnings`` makes it forget all these notes: after a check
within a training loop, each warning of the loop would appear again. Here the notes are
put back at the end.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet"]

Registry = dict[Any, Any]
_VERSION = "version"  # of the filters; with another one, Python forgets the notes


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which warnings are ignored."""
    now = _version()
    kept = [(notes, dict(notes)) for notes in _notes() if notes.get(_VERSION) == now]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        present = {} if now is None else {_VERSION: _version()}
        for notes, content in kept:
            notes |= content | present


def _notes() -> Iterator[Registry]:
    """Yield the notes of each module, of warnings that were shown there."""
    for module in [*sys.modules.values()]:
        found = getattr(module, "__dict__", {}).get("__warningregistry__")
        if isinstance(found, dict):
            yield found


def _version() -> Any:
    """Return the version of the filters, which Python tells only in notes."""
    notes: Registry = {}
    shown = warnings.showwarning
    warnings.showwarning = lambda *_, **__: None
    try:
        warnings.warn_explicit("", UserWarning, "", 1, registry=notes)
    except UserWarning:  # where warnings are errors
        pass
    finally:
        warnings.showwarning = shown
    return notes.get(_VERSION)
