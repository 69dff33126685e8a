"""``opacus-pi verify``: is a file whole and unedited?"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from opacus_pi.accounting import GradNormLedger, GramLedger
from opacus_pi.accounting.ledger.storage import check_file
from opacus_pi.cli.arguments import add_output
from opacus_pi.cli.errors import DONE, FAILED, BadInput, about, one_line
from opacus_pi.cli.output import answer
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.unlearning.deletion_record import verify

HELP = "check a deletion record's chain, or a ledger's or oracle's checksum"
_NO_HEAD = "HEAD: only a deletion record has one. Leave it out."
DESCRIPTION = """\
A deletion record: every line's hash and its link to the line before. The chain alone
cannot show that the last lines were cut off: pass HEAD, the hash of the last entry,
kept elsewhere. A ledger, Gram ledger, oracle or trace: its checksum, version and shape.
Checks find damage and careless edits; a checksum is no signature.

Exit code 0: verified. 1: not verified. 2: there is no such file, or bad arguments."""
EXAMPLES = """\
examples:
  opacus-pi verify ledger.safetensors
  opacus-pi verify deletions.jsonl
  opacus-pi verify deletions.jsonl 5f0c...e1"""


def _oracle(path: str) -> None:
    """Check a retrained model's file."""
    check_file(path, "opacus_pi.Oracle", 1)


_CHECKS: dict[str, Callable[[str], Any]] = {
    "opacus_pi.GradNormLedger": GradNormLedger.load,
    "opacus_pi.GramLedger": GramLedger.load,
    "opacus_pi.Oracle": _oracle,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", metavar="FILE", help="the file to check")
    parser.add_argument(
        "head",
        metavar="HEAD",
        nargs="?",
        help="hash that the last entry of a deletion record must have",
    )
    add_output(parser, file=False)


def run(options: argparse.Namespace) -> int:
    """Check and print; the exit code says the result."""
    with about("FILE", "Name a deletion record, ledger or oracle."):
        with open(options.file, "rb") as file:
            start = file.read(8)
    is_text = b"\0" not in start  # safetensors begins with a length of eight bytes
    if options.head is not None and not is_text:
        raise BadInput(_NO_HEAD)
    try:
        if not start:
            raise ValueError("the file is empty: there is nothing to verify")
        kind, said = _text(options) if is_text else _arrays(options.file)
        facts = {"verified": True, "kind": kind, **said}
    except (ValueError, SafetensorError) as error:
        facts = {"verified": False, "reason": one_line(error)}
    facts = {"format": "opacus_pi.cli.verify.v1", "file": options.file, **facts}
    answer(options, facts, _words(facts))
    return DONE if facts["verified"] else FAILED


def _text(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Check a trace or a deletion record."""
    try:
        content = json.loads(Path(options.file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # lines, or damaged
        content = None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != "opacus_pi.UnlearningTrace":
        return _record(options)
    if options.head is not None:
        raise BadInput(_NO_HEAD)
    UnlearningTrace.load(options.file)
    return kind, {}


def _record(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Check a chain."""
    head = verify(options.file, options.head)
    return "deletion record", {"head": head}


def _arrays(path: str) -> tuple[str, dict[str, str]]:
    """Check a file of arrays by its own kind."""
    with safe_open(path, framework="np") as file:
        kind = (file.metadata() or {}).get("kind", "")
    if kind not in _CHECKS:
        raise ValueError(
            f"{Path(path).name} is not one of {', '.join(_CHECKS)}: it carries no "
            "checksum of ours"
        )
    _CHECKS[kind](path)
    return kind, {}


def _words(facts: dict[str, Any]) -> str:
    """The answer for people."""
    if not facts["verified"]:
        return f"NOT VERIFIED: {facts['reason']}"
    head = f", head {facts['head']}" if "head" in facts else ""
    return f"verified: {facts['kind']}{head}"
