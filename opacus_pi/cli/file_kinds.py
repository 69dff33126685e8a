"""What kind of file is it, and what in it can be checked.

The kind is told from marks in the content, never from the name, and from marks that
stand in more than one place: a damaged file of ours is still told from a foreign one.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp(), "notes.txt")
>>> _ = path.write_text("buy milk")
>>> recognised(path).words
'a text'
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from opacus_pi.files.arrays_file import named_kind
from opacus_pi.files.checksummed_state import verified_state
from opacus_pi.files.kinds import KINDS, TRACE, kind_in
from opacus_pi.integration.checkpoints import CHECKPOINT_KEY, FILTER_KEY
from opacus_pi.unlearning.deletion_log import (
    Verification,
    looks_like_a_log,
    verify,
)
from opacus_pi.unlearning.json_lines_log import FIRST_BYTES, verify_json_lines

LOG = "deletion log"
OLD_LOG = "deletion log of JSON lines"
CHECKPOINT = "record in a checkpoint"
_TRACE = (TRACE.name.encode(), b'"unit": "epochs", "cost"')
_SEALED = re.compile(rb'opacus_pi\.|"checksum":"[0-9a-f]{64}"')
_LINE = (b'"body":', b'"hash":"', b'"previous":"')  # of a deletion log
_HEAD = 1 << 20  # bytes that are looked at
_MOST = 100_000_000  # bytes of a header that safetensors reads


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Args:
        words: Its kind: the name of one of ours that can be checked, else in words.
        check: Raises ``ValueError`` if the file is damaged or edited, and returns more
            facts; None where nothing in it can be checked.
        ours: Whether this package wrote it.
    """

    words: str
    check: Callable[[], dict[str, Any]] | None = None
    ours: bool = False


def recognised(path: Path, head: str | None = None) -> FileKind:
    """The kind of a file.

    Args:
        path: The file.
        head: Hash of an entry, where it is given; then an empty file is a deletion
            log that lost everything.
    """
    with path.open("rb") as file:
        start = file.read(_HEAD)
    if not start and head is None:
        return FileKind("an empty file")
    if not start or looks_like_a_log(start):
        return FileKind(LOG, partial(_chain, verify, path, head), ours=True)
    if start.startswith(FIRST_BYTES) or sum(mark in start for mark in _LINE) > 1:
        check = partial(_chain, verify_json_lines, path, head)
        return FileKind(OLD_LOG, check, ours=True)
    if start[8:9] == b"{" and b"\0" in start[:8]:  # a length, then JSON: safetensors
        return _arrays(path, start)
    if start.startswith(b"PK"):
        return _archive(path)
    return _text(path, start)


def _chain(
    check: Callable[[Path, str | None], Verification], path: Path, head: str | None
) -> dict[str, Any]:
    """The head of a deletion log, and how much was added since an earlier one."""
    found = check(path, head)
    facts: dict[str, Any] = {"head": found.head}
    if found.num_added is not None:
        facts["added"] = found.num_added
    if found.redacted:
        facts["redacted"] = list(found.redacted)
    return facts


def _arrays(path: Path, start: bytes) -> FileKind:
    """A safetensors file, ours or not."""
    length = int.from_bytes(start[:8], "little")
    if path.stat().st_size < 8 + length <= _MOST:
        return FileKind("safetensors", partial(_cut_off, path, length))
    if not _SEALED.search(start[8 : 8 + length]):
        return FileKind("weights or other arrays (safetensors)")
    named = named_kind(path)
    if named is None:  # the header is damaged, but may still name a kind
        found = kind_in(start)
        named = found.name if found else ""
    read = KINDS[named].read if named in KINDS else partial(_refuse, named)

    def check() -> dict[str, Any]:
        read(path)
        return {}

    return FileKind(named or "a file of opacus_pi", check, ours=True)


def _cut_off(path: Path, length: int) -> dict[str, Any]:
    """Say that a file ends inside its header."""
    raise ValueError(
        f"{path.name} is damaged: it says that its header has {length} bytes, and ends "
        f"after {path.stat().st_size} in all. Restore it from a copy."
    )


def _refuse(kind: str, path: Path) -> None:
    """Say that a file of ours is of no kind that this release knows."""
    raise ValueError(
        f"{path.name} says that it holds {kind or 'nothing'}, which this release does "
        "not know: it is damaged, or a newer release wrote it"
    )


def _archive(path: Path) -> FileKind:
    """A file of ``torch.save``, or another archive."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        content = None
    sealed = {}
    if isinstance(content, dict):
        sealed = {k: content[k] for k in (CHECKPOINT_KEY, FILTER_KEY) if k in content}
    if not sealed and (content is not None or not _names_us(path)):
        return FileKind("an archive or weights, not of a recorded run")

    def check() -> dict[str, Any]:
        if not sealed:
            raise ValueError(f"{path.name} cannot be read: it is damaged")
        for state in sealed.values():
            verified_state(state)
        return {}

    return FileKind(CHECKPOINT, check, ours=True)


def _names_us(path: Path) -> bool:
    """Whether an archive that cannot be read has our key in it."""
    with path.open("rb") as file:
        parts = iter(lambda: file.read(_HEAD), b"")
        return any(CHECKPOINT_KEY.encode() in part for part in parts)


def _text(path: Path, start: bytes) -> FileKind:
    """A page, JSON, text or noise."""
    if any(mark in start for mark in _TRACE):

        def check() -> dict[str, Any]:
            TRACE.read(path)
            return {}

        return FileKind(TRACE.name, check, ours=True)
    if start.lstrip()[:9].lower() == b"<!doctype":
        ours = b'content="opacus_pi"' in start
        return FileKind("a report's page" if ours else "a page", ours=ours)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return FileKind("data of an unknown kind" if b"\0" in start else "a text")
    form = content.get("format") if isinstance(content, dict) else None
    if kind := kind_in(json.dumps({"format": form}).encode()):
        return FileKind(kind.words, ours=True)
    if isinstance(content, dict) and {"method", "forget_indices"} <= set(content):
        return FileKind("the record of an unlearning run", ours=True)
    return FileKind("JSON")
