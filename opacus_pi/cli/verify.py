"""``opacus-pi verify``: is a file whole and unedited?"""

import argparse
from pathlib import Path
from typing import Any

from opacus_pi.cli.arguments import add_output
from opacus_pi.cli.errors import (
    DONE,
    FAILED,
    NOTHING_TO_CHECK,
    BadInput,
    about,
    one_line,
)
from opacus_pi.cli.file_kinds import RECORD, FileKind, recognised
from opacus_pi.cli.output import answer

HELP = "check a deletion record's chain, or the checksum of another file of ours"
DESCRIPTION = """\
What kind of file it is, and whether it is whole and unedited.

A deletion record: every line's hash and its link to the line before. The chain alone
cannot show that the last lines were cut off: pass HEAD, the hash of the last entry when
you noted it, kept elsewhere; what was added since is counted. A ledger, Gram ledger,
oracle, trace, recorded or unlearned weights, a checkpoint's record (not the model
beside it): checksum, version and shape. Reports,
guarantees and records of runs carry no checksum: make them again from the ledger.
Checks find damage and careless edits; a checksum is no signature.

Exit code 0: verified. 1: checked, and not as it was written. 2: there is no such
file, or bad arguments. 3: not checked: it is no file of ours, or has no checksum."""
EXAMPLES = """\
examples:
  opacus-pi verify ledger.safetensors
  opacus-pi verify deletions.jsonl
  opacus-pi verify deletions.jsonl 5f0c...e1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", metavar="FILE", help="the file to check")
    parser.add_argument(
        "head",
        metavar="HEAD",
        nargs="?",
        help="hash that an entry of a deletion record must have",
    )
    add_output(parser, file=False)


def run(options: argparse.Namespace) -> int:
    """Check and print; the exit code says the result."""
    if Path(options.file).is_dir():
        raise BadInput(
            f"FILE: {options.file} is a directory. Name one file in it, such as a "
            "deletion record, a ledger or weights.safetensors."
        )
    with about("FILE", "Name a deletion record, ledger or oracle."):
        kind = recognised(Path(options.file), options.head)
    if options.head is not None and kind.words != RECORD:
        raise BadInput(
            f"HEAD: only a deletion record has one, and {options.file} is "
            f"{kind.words}. Leave it out."
        )
    facts = {
        "format": "opacus_pi.cli.verify.v1",
        "file": options.file,
        "kind": kind.words,
        **_found(kind),
    }
    answer(options, facts, _words(facts))
    return {True: DONE, False: FAILED, None: NOTHING_TO_CHECK}[facts["verified"]]


def _found(kind: FileKind) -> dict[str, Any]:
    """Whether a file is as it was written, None where that cannot be told."""
    if kind.check is None:
        reason = (
            "it carries no checksum; make it again from the ledger"
            if kind.ours
            else "it is not a file of ours"
        )
        return {"verified": None, "reason": reason}
    try:
        return {"verified": True, **kind.check()}
    except ValueError as error:
        return {"verified": False, "reason": one_line(error)}


def _words(facts: dict[str, Any]) -> str:
    """The answer for people."""
    if facts["verified"] is None:
        return f"NOT CHECKED: {facts['file']} is {facts['kind']}: {facts['reason']}"
    if not facts["verified"]:
        return f"NOT VERIFIED: {facts['reason']}"
    head = f", head {facts['head']}" if "head" in facts else ""
    return f"verified: {facts['kind']}{head}{_since(facts.get('added'))}"


def _since(added: int | None) -> str:
    """How many entries came after the head that was given."""
    if added is None:
        return ""
    if added == 0:
        return "; HEAD is that of the last entry"
    were = "entry was" if added == 1 else "entries were"
    return f"; {added} {were} added since HEAD"
