"""``opacus-pi verify``: check a file for damage and edits.

There are three answers: verified, not verified, and not checked. The third one is for
files without a checksum and for files of other programs: to call them "not verified"
would suggest that they were edited.
"""

import argparse
from pathlib import Path
from typing import Any

from opacus_pi.cli.errors import (
    DONE,
    FAILED,
    NOTHING_TO_CHECK,
    BadInput,
    about,
    one_line,
)
from opacus_pi.cli.output import answer
from opacus_pi.cli.recognition import (
    EXPORT,
    LOG,
    OLD_LOG,
    CannotBeCheckedError,
    Recognised,
    recognise,
)


def run(options: argparse.Namespace) -> int:
    """Check the file and print the result, which is also the exit code.

    Args:
        options: The parsed arguments of ``verify``.

    Returns:
        0 if the file is unchanged, 1 if not, 3 if it cannot be checked.

    Raises:
        BadInput: If there is no such file, it is a directory, or a head was given for a
            file that is not a deletion log.
    """
    if Path(options.file).is_dir():
        raise BadInput(
            f"FILE: {options.file} is a directory. Name one file in it, such as a "
            "deletion log, a ledger or weights.safetensors."
        )
    with about("FILE", "Name a deletion log, ledger or oracle."):
        found = recognise(Path(options.file), options.head)
    if options.head is not None and found.description not in (LOG, OLD_LOG, EXPORT):
        raise BadInput(
            f"HEAD: only a deletion log has a head, but {options.file} is of the kind "
            f"'{found.description}'. Leave HEAD out."
        )
    facts = {
        "format": "opacus_pi.cli.verify.v1",
        "file": options.file,
        "kind": found.description,
        **_checked(found),
    }
    if facts["verified"] is not False and found.hashes is not None:
        facts |= found.hashes()
    answer(options, facts, _text(facts))
    return {True: DONE, False: FAILED, None: NOTHING_TO_CHECK}[facts["verified"]]


def _checked(found: Recognised) -> dict[str, Any]:
    """Check a file and return the result as facts.

    Returns:
        ``verified``: True if the file is unchanged since it was written, False if not,
        None if it cannot be checked; with ``reason`` unless it is True.
    """
    if found.check is None:
        reason = found.reason or (
            "it has no checksum; make it again and compare the two"
            if found.ours
            else "it is not an opacus_pi file"
        )
        return {"verified": None, "reason": reason}
    try:
        return {"verified": True, **found.check()}
    except (CannotBeCheckedError, MemoryError) as error:
        reason = one_line(error) or "there is not enough memory to read it"
        return {"verified": None, "reason": reason}
    except ValueError as error:
        return {"verified": False, "reason": one_line(error)}


def _text(facts: dict[str, Any]) -> str:
    """Return the answer as text for a person.

    Args:
        facts: The answer for programs. ``added`` and ``redacted`` are in it for
            deletion logs only, ``statement`` for what is shown about a deletion, and
            ``weights_file`` and ``weights`` for files of weights.
    """
    if facts["verified"] is None:
        why = f"{facts['file']} is {facts['kind']}: {facts['reason']}"
        return f"NOT CHECKED: {why}{_hashes(facts)}"
    if not facts["verified"]:
        return f"NOT VERIFIED: {facts['reason']}"
    head = f", head {facts['head']}" if "head" in facts else ""
    added = _added(facts.get("added"))
    notes = f"{added}{_redacted(facts)}{_back_in_time(facts)}"
    says = f"\n\n{facts['statement']}" if "statement" in facts else ""
    return f"verified: {facts['kind']}{head}{notes}{_hashes(facts)}{says}"


def _hashes(facts: dict[str, Any]) -> str:
    """Return the hashes of a file of weights as lines; empty for other files."""
    names = {"weights_file": "the file", "weights": "its weights"}
    return "".join(
        f"\nSHA-256 of {words}: {facts[name]}"
        for name, words in names.items()
        if name in facts
    )


def _back_in_time(facts: dict[str, Any]) -> str:
    """Return a sentence about entries whose time goes back; empty if there are none."""
    numbers = facts.get("back_in_time", [])
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:10])) + ", ..." * (len(numbers) > 10)
    return (
        f"; {_entries(len(numbers), 'has', 'have')} a time before that of an earlier "
        f"entry (number {shown}): a clock was wrong"
    )


def _redacted(facts: dict[str, Any]) -> str:
    """Return a sentence about the redacted entries; empty if there are none."""
    numbers = facts.get("redacted", [])
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:10])) + ", ..." * (len(numbers) > 10)
    return f"; {_entries(len(numbers), 'is', 'are')} redacted (number {shown})"


def _added(added: int | None) -> str:
    """Return a sentence about the entries since the given head; empty without one."""
    if added is None:
        return ""
    if added == 0:
        return "; HEAD is the hash of the last entry"
    return f"; {_entries(added, 'was', 'were')} added since HEAD"


def _entries(number: int, one: str, more: str) -> str:
    """Return a number of entries and the verb that fits it.

    >>> _entries(1, "is", "are")
    '1 entry is'
    """
    return f"1 entry {one}" if number == 1 else f"{number} entries {more}"
