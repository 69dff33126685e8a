"""Refuse to write a file over one of another kind.

A wrong name could destroy what cannot be made again: a deletion log, the states of a
training, a data set. So a writer replaces a file only by one of the same kind: a ledger
by a ledger, a text by a text. Only the first bytes of the two contents are compared, so
it does not matter how the name is spelled, or by which link it leads to the file.

*What breaks it.* Two files of one kind: a ledger that is saved under the name of
another one replaces it.

>>> import tempfile
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp(), "deletions.db")
>>> _ = path.write_bytes(b"SQLite format 3" + bytes(85))
>>> require_replaceable(path, b'{"kind": "opacus_pi.DeletionLogExport"}')
Traceback (most recent call last):
    ...
ValueError: path must be new or hold a deletion log for an auditor, got a deletion log or another database in ...deletions.db. Nothing was written. Choose another name.
"""  # noqa: E501

import os
import re

from opacus_pi._validate import expect
from opacus_pi.files.kinds import ANSWER, REPORT, kind_in

__all__ = ["START", "require_replaceable"]

START = 1 << 16  # bytes of a file that show its kind
_TEXT = "a text"
_OTHER = "data of another kind"
_MARKS = {
    "a deletion log or another database": re.compile(rb"SQLite format 3\0"),
    "a deletion log of JSON lines": re.compile(rb'{"body":'),
    "the key of a deletion log": re.compile(rb"[0-9a-f]{64}\s*\Z"),
}
# In an archive of torch.save, whose first entry is the name of a format of opacus_pi.
_FORMAT = re.compile(rb"format.{1,12}(opacus_pi\.[A-Za-z]+)", re.DOTALL)


def require_replaceable(path: str | os.PathLike[str], start: bytes) -> None:
    """Refuse to replace a file by one of another kind.

    Args:
        path: The file that is about to be replaced; it need not exist.
        start: The first ``START`` bytes of the new content, or all of it.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        with open(path, "rb") as file:
            found = file.read(START)
    except OSError:  # there is none, or its owner may not read it
        return
    old, new = _kind_of(found), _kind_of(start[:START])
    is_text_by_text = old == _TEXT and _is_text(start)
    expect(
        not found or old == new or is_text_by_text,
        "path",
        f"{old} in {os.fspath(path)}",
        f"must be new or hold {new}",
        "Nothing was written. Choose another name.",
    )


def _kind_of(start: bytes) -> str:
    """Return the kind of a content as words, from its first bytes."""
    for words, mark in _MARKS.items():
        if mark.match(start):
            return words
    if start.startswith(b"PK"):
        named = _FORMAT.search(start, 0, 4096)
        return "a file of torch.save" + (f" ({named[1].decode()})" if named else "")
    is_arrays = start[8:9] == b"{" and b"\0" in start[:8]  # a length, then JSON
    has_kind = is_arrays or start.startswith(b"{")
    kind = kind_in(start if is_arrays else start[:200]) if has_kind else None
    if kind is not None and kind not in (ANSWER, REPORT):  # these may be made again
        return kind.words
    if is_arrays:
        return "weights or other arrays (safetensors)"
    return _TEXT if _is_text(start) else _OTHER


def _is_text(start: bytes) -> bool:
    """Return whether bytes begin a text in UTF-8."""
    try:
        return "\0" not in start[:START].decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"  # cut within a character
