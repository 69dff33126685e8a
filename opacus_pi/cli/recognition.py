"""Recognise the kind of a file from its content, and how it can be checked.

The name of a file proves nothing, so only the content is looked at: the first megabyte
for a name of ``files.kinds`` and for other marks of the formats that opacus_pi writes.
Only regular files are opened (a pipe would wait for ever), archives may not need more
memory than their size, and texts are read up to a limit.
Each format has marks in more than one place. A damaged file is therefore still
recognised as one of opacus_pi, and reported as damaged instead of as foreign.

*What breaks it.* A file whose marks are all damaged counts as foreign (exit code 3, not
0). No content is ever run: archives are read by ``read_torch_file``.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp(), "notes.txt")
>>> _ = path.write_text("buy milk")
>>> recognise(path).description
'a text'
"""

import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opacus_pi.cli.errors import one_line
from opacus_pi.cli.owners import OWNERS_OF
from opacus_pi.files.arrays_file import named_kind
from opacus_pi.files.checksummed_json import has_checksum, require_unedited
from opacus_pi.files.checksummed_state import verified_state
from opacus_pi.files.kinds import (
    ANSWER,
    DELETION_STATEMENT,
    GUARANTEE,
    KINDS,
    LOG_EXPORT,
    REPORT,
    TRACE,
    UNLEARNED_WEIGHTS,
    kind_in,
)
from opacus_pi.files.plain_json import plain_json
from opacus_pi.files.torch_file import (
    OtherObjects,
    read_torch_file,
    require_bounded,
)
from opacus_pi.integration.checkpoints import CHECKPOINT_KEY, FILTER_KEY
from opacus_pi.recording.state_file import STATE_FORMAT, read_state
from opacus_pi.unlearning import DeletionStatement
from opacus_pi.unlearning.deletion_log import (
    Verification,
    looks_like_a_log,
    verify,
)
from opacus_pi.unlearning.json_lines_log import FIRST_BYTES, verify_json_lines
from opacus_pi.unlearning.log_export import verify_export
from opacus_pi.unlearning.released_weights import hashes_of_weights
from opacus_pi.unlearning.saved_result import read_guarantee

LOG = "deletion log"
OLD_LOG = "deletion log of JSON lines"
EXPORT = LOG_EXPORT.words
CHECKPOINT = "ledger in a checkpoint"
STATE = "saved state of a training"
_RECORD = "the record of an unlearning run"
_PAGE = "a report's page"
_OWNERS = "positions by person, as --owners takes them"
_OF_OWNERS = (
    "it has no checksum, because you made it. --owners compares its entry {0!r}, the "
    "fingerprint of the data set that it is of, with the data set at hand: this file "
    "has {1}"
)
_EMPTY, _PIPE, _TEXT, _JSON = "an empty file", "a pipe or a device", "a text", "JSON"
# What a command may write over: answers, reports, and what people write by hand.
_REPLACEABLE = {
    *(ANSWER.words, REPORT.words, _PAGE, "a page"),
    *(_EMPTY, _PIPE, _TEXT, _JSON, _OWNERS),
}
_TRACE = (TRACE.name.encode(), b'"unit": "epochs", "cost"')
# In the header of a safetensors file of opacus_pi: a kind, or a checksum.
_OURS = re.compile(rb'opacus_pi\.|"checksum":"[0-9a-f]{64}"')
_LINE = (b'"body":', b'"hash":"', b'"previous":"')  # of an old deletion log
_NUM_BYTES = 1 << 20  # of a file that are looked at
_MAX_HEADER = 100_000_000  # bytes of a header that safetensors reads
_MAX_TEXT = 1 << 28  # bytes of a text, JSON or old log that are read at once


class CannotBeCheckedError(Exception):
    """A file cannot be checked here, whether or not it is whole."""


@dataclass(frozen=True)
class Recognised:
    """The kind of a file, and the function that checks it.

    Args:
        description: The name of its kind if the file can be checked, else a few words.
        check: Raises ``ValueError`` if the file is damaged or edited,
            ``CannotBeCheckedError`` if it cannot be read here, and returns further
            facts; None if nothing in the file can be checked.
        ours: Whether opacus_pi wrote the file.
        reason: Why the file cannot be checked, if that is known.
        hashes: Returns the SHA-256 of the file and of the weights in it, by the names
            that a statement about a deletion has for them; None if it is no file of
            weights.
    """

    description: str
    check: Callable[[], dict[str, Any]] | None = None
    ours: bool = False
    reason: str = ""
    hashes: Callable[[], dict[str, str]] | None = None


def recognise(path: Path, head: str | None = None) -> Recognised:
    """Recognise a file.

    Args:
        path: The file.
        head: Hash that an entry of a deletion log must have, or None. With a hash, an
            empty file is a deletion log that lost all of its entries.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        reason = "it can be read only once: save its content to a file first"
        return Recognised(_PIPE, reason=reason)
    with path.open("rb") as file:
        start = file.read(_NUM_BYTES)
    if not start and head is None:
        return Recognised(_EMPTY)
    if log := _log(path, start, head):
        return log
    if start[8:9] == b"{" and b"\0" in start[:8]:  # a length, then JSON: safetensors
        return _arrays(path, start)
    if start.startswith(b"PK"):
        return _archive(path)
    return _text(path, start)


def kept_content(path: Path) -> str:
    """Return what a file holds that a command must not write over.

    Args:
        path: The file; it need not exist.

    Returns:
        Its kind, such as ``"deletion log"``; empty if there is no such file, or it is a
        text, an answer or a report.
    """
    try:
        found = recognise(path).description
    except OSError:  # there is none, or its writer says what is wrong with it
        return ""
    return "" if found in _REPLACEABLE else found


def _log(path: Path, start: bytes, head: str | None) -> Recognised | None:
    """Recognise a deletion log, of this or an earlier release; None for other files.

    Every line of a log of early releases has three known keys. Two of them suffice, so
    that a log with a damaged first line is still checked, and reported as damaged.

    Args:
        path: The file.
        start: Its first megabyte.
        head: Hash that an entry must have, or None.
    """
    if not start or looks_like_a_log(start):
        return Recognised(LOG, partial(_chain, verify, path, head), ours=True)
    if LOG_EXPORT.name.encode() in start[:200]:
        check = partial(_chain, verify_export, path, head)
        return Recognised(EXPORT, partial(_within_limit, path, check), ours=True)
    if start.startswith(FIRST_BYTES) or sum(mark in start for mark in _LINE) > 1:
        check = partial(_chain, verify_json_lines, path, head)
        return Recognised(OLD_LOG, partial(_within_limit, path, check), ours=True)
    return None


def _chain(
    check: Callable[[Path, str | None], Verification], path: Path, head: str | None
) -> dict[str, Any]:
    """Check a deletion log: return its head, and what was added since another head.

    Args:
        check: The function for the log's format.
        path: The log.
        head: Hash that an entry must have, or None.

    Returns:
        ``head``; ``added``, the number of entries after the given head, if one was
        given; ``redacted``, the numbers of the redacted entries, if there are any.

    Raises:
        ValueError: If an entry is damaged or missing.
    """
    found = check(path, head)
    facts: dict[str, Any] = {"head": found.head}
    if found.num_added is not None:
        facts["added"] = found.num_added
    if found.redacted:
        facts["redacted"] = list(found.redacted)
    if found.back_in_time:
        facts["back_in_time"] = list(found.back_in_time)
    return facts


def _within_limit(path: Path, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a check that reads a whole file, unless the file is too large for that."""
    if (size := path.stat().st_size) > _MAX_TEXT:
        raise CannotBeCheckedError(
            f"it has {size} bytes, and a text or JSON is read up to {_MAX_TEXT} bytes"
        )
    return check()


def _arrays(path: Path, start: bytes) -> Recognised:
    """Recognise a safetensors file.

    The file begins with the length of its header, 8 bytes, and the header, in JSON. If
    the header is cut off, nothing can say whether opacus_pi wrote the file: it has a
    check that fails, but does not count as ours.
    """
    length = int.from_bytes(start[:8], "little")
    if path.stat().st_size < 8 + length <= _MAX_HEADER:
        return Recognised("safetensors", partial(_cut_off, path, length))
    if not _OURS.search(start[8 : 8 + length]):
        hashes = partial(hashes_of_weights, path)
        return Recognised("weights or other arrays (safetensors)", hashes=hashes)
    named = named_kind(path)
    if named is None:  # the header is damaged, but may still name a kind
        found = kind_in(start)
        named = found.name if found else ""
    read = KINDS[named].read if named in KINDS else partial(_refuse, named)

    def check() -> dict[str, Any]:
        read(path)
        return {}

    is_released = named == UNLEARNED_WEIGHTS.name
    return Recognised(
        named or "a file of opacus_pi",
        check,
        ours=True,
        hashes=partial(hashes_of_weights, path) if is_released else None,
    )


def _cut_off(path: Path, length: int) -> dict[str, Any]:
    """Report that a file ends inside its header.

    Args:
        path: The file.
        length: Bytes that the header must have, as the file itself says.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{path.name} is damaged: its header should have {length} bytes, but the whole "
        f"file has {path.stat().st_size}. Restore it from a copy."
    )


def _refuse(kind: str, path: Path) -> None:
    """Report that a file names a kind that this release does not know.

    Args:
        kind: What the file names; empty if it has a checksum but names no kind.
        path: The file.

    Raises:
        ValueError: Always.
    """
    unknown = (
        f"names the kind {kind}, which this release does not know"
        if kind
        else "does not say of which kind it is"
    )
    raise ValueError(
        f"{path.name} {unknown}: the file is damaged, or a newer release wrote it"
    )


def _archive(path: Path) -> Recognised:
    """Recognise a file of ``torch.save``, or another archive.

    A checkpoint that cannot be read is still recognised by the key of its ledger, and a
    saved state by its format: the archive contains both as plain text.
    """
    content, fault = None, ""
    try:
        require_bounded(path)
        content = read_torch_file(path, map_location="cpu", mmap=True)
    except OtherObjects as error:
        if _has(CHECKPOINT_KEY, path):
            return Recognised(CHECKPOINT, ours=True, reason=one_line(error))
    except (ValueError, RuntimeError, EOFError, OSError, MemoryError) as error:
        fault = one_line(error)
    is_state = isinstance(content, dict) and content.get("format") == STATE_FORMAT
    if is_state or (content is None and _has(STATE_FORMAT, path)):

        def check_state() -> dict[str, Any]:
            read_state(path)
            return {}

        return Recognised(STATE, check_state, ours=True)
    states = {}  # those of opacus_pi, which have a checksum
    if isinstance(content, dict):
        states = {k: content[k] for k in (CHECKPOINT_KEY, FILTER_KEY) if k in content}
    if not states and (content is not None or not _has(CHECKPOINT_KEY, path)):
        hashes = partial(hashes_of_weights, path)
        kind = "an archive, or weights without a recorded run"
        return Recognised(kind, hashes=hashes)

    def check() -> dict[str, Any]:
        if not states:
            raise ValueError(f"{path.name} cannot be read: {fault}")
        for state in states.values():
            verified_state(state, path.name)
        return {}

    return Recognised(CHECKPOINT, check, ours=True)


def _has(mark: str, path: Path) -> bool:
    """Return whether an unreadable archive has a text that only opacus_pi writes.

    Args:
        mark: The key of a checkpoint's ledger, or the format of a saved state.
        path: The archive.
    """
    with path.open("rb") as file:
        parts = iter(lambda: file.read(_NUM_BYTES), b"")
        return any(mark.encode() in part for part in parts)


def _text(path: Path, start: bytes) -> Recognised:
    """Recognise a page, JSON, a text or other data.

    Args:
        path: The file.
        start: Its first megabyte.
    """
    if any(mark in start for mark in _TRACE):

        def check() -> dict[str, Any]:
            TRACE.read(path)
            return {}

        return Recognised(TRACE.name, partial(_within_limit, path, check), ours=True)
    if start.lstrip()[:9].lower() == b"<!doctype":
        ours = b'content="opacus_pi"' in start
        return Recognised(_PAGE if ours else "a page", ours=ours)
    if path.stat().st_size > _MAX_TEXT:
        return Recognised("a large file of an unknown kind")
    try:
        content = plain_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return Recognised("data of an unknown kind" if b"\0" in start else _TEXT)
    return _json(path, content)


def _check_of_json(
    path: Path, content: dict[str, Any]
) -> Callable[[], dict[str, Any]] | None:
    """Return how JSON with a checksum is checked; None for JSON without one."""
    if not has_checksum(content):
        return None

    def check() -> dict[str, Any]:
        require_unedited(
            content, path.name, "Restore it from a copy, or make it again."
        )
        return {}

    return check


def _json(path: Path, content: Any) -> Recognised:
    """Recognise JSON. Files of earlier releases, and some answers, have no checksum.

    Args:
        path: The file.
        content: The parsed file. Its entry ``format`` names the kind, except in records
            of unlearning runs, which are known by their entries.
    """
    form = content.get("format") if isinstance(content, dict) else None
    if form == f"{GUARANTEE.name}.v{GUARANTEE.version}":

        def check() -> dict[str, Any]:
            read_guarantee(path)
            return {}

        return Recognised(GUARANTEE.words, check, ours=True)
    if form == f"{DELETION_STATEMENT.name}.v{DELETION_STATEMENT.version}":

        def says() -> dict[str, Any]:
            return {"statement": str(DeletionStatement.load(path))}

        return Recognised(DELETION_STATEMENT.words, says, ours=True)
    if kind := kind_in(json.dumps({"format": form}).encode()):
        check_of_answer = _check_of_json(path, content) if kind == ANSWER else None
        return Recognised(kind.words, check_of_answer, ours=True)
    if isinstance(content, dict) and {"method", "forget_indices"} <= set(content):
        return Recognised(_RECORD, _check_of_json(path, content), ours=True)
    if isinstance(content, dict) and _are_positions(content):
        has = "one" if isinstance(content.get(OWNERS_OF), str) else "none"
        reason = _OF_OWNERS.format(OWNERS_OF, has)
        return Recognised(_OWNERS, reason=reason)
    return Recognised(_JSON)


def _are_positions(content: dict[str, Any]) -> bool:
    """Return whether JSON lists positions by person, and nothing else but a data set.

    Args:
        content: A JSON object.
    """
    lists = [v for k, v in content.items() if k != OWNERS_OF]
    is_named = isinstance(content.get(OWNERS_OF, ""), str)
    return (
        is_named
        and bool(lists)
        and all(
            isinstance(one, list) and all(type(x) is int for x in one) for one in lists
        )
    )
