"""Refuse a command that would write over a file that it reads, or over its own output.

Which files a command reads and writes follows from its arguments alone, so this is
checked before anything is computed. ``report`` writes a JSON file beside its page,
and a deletion log has its weights, key and lock beside it: they count too. A file that
is no input of the command is written over only if it is a text, an answer or a report,
or an export by a new one: never a ledger, weights, or a deletion log.

*What breaks it.* A file that gets one of these names while the command runs.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.recognition import EXPORT, kept_content
from opacus_pi.unlearning.saved_result import RUN_FILES

_READ = (
    "ledger",
    "weights",
    "oracle",
    "owners",
    "evaluation",
    "forget_indices",
    "only",
    "file",
)
_BESIDE_LOG = ("", ".safetensors", ".key", ".lock")


def require_separate_outputs(options: argparse.Namespace) -> None:
    """Check that no file would be written over another one that is needed.

    Args:
        options: The parsed arguments.

    Raises:
        BadInput: If a file to write is also to be read, is to be written twice, or
            holds a ledger, weights, a deletion log or other data.
    """
    outputs, inputs = list(_written(options)), list(_read(options))
    for i, path in enumerate(outputs):
        for other in [*outputs[:i], *inputs]:
            if _is_same_file(path, other):
                raise BadInput(
                    f"{path} is named twice, so a file would be written over. Choose "
                    "another name for the file to write."
                )
        kept = kept_content(Path(path))
        if kept == EXPORT and path == getattr(options, "export_file", None):
            continue  # a new export may replace an earlier one
        if kept:
            raise BadInput(
                f"{path} would be written over, but it is neither a text nor an answer "
                f"(its kind: {kept}). Choose another name for the file to write."
            )
    if getattr(options, "log", None) and _new_directory(options):
        place = os.path.realpath(options.log)
        if place.startswith(os.path.join(os.path.realpath(options.out), "")):
            raise BadInput(
                f"--log: {options.log} is inside of --out, which must be a new "
                "directory. Keep the log of a model apart from the results of its runs."
            )


def _new_directory(options: argparse.Namespace) -> bool:
    """Return whether ``--out`` names a directory, which may not have content."""
    return bool(options.command == "unlearn")


def _written(options: argparse.Namespace) -> Iterator[str]:
    """Yield the files that a command writes.

    Args:
        options: The parsed arguments.
    """
    named = vars(options)
    for name in ("json_file", "csv", "export_file"):
        yield from filter(None, [named.get(name)])
    if named.get("out") and not _new_directory(options):
        yield from {options.out, str(Path(options.out).with_suffix(".json"))}


def _read(options: argparse.Namespace) -> Iterator[str]:
    """Yield the files that a command reads, as far as they exist.

    Args:
        options: The parsed arguments.
    """
    named = vars(options)
    for name in _READ:
        found = named.get(name)
        yield from filter(None, found if isinstance(found, list) else [found])
    if named.get("log"):
        place = os.path.realpath(options.log)
        yield from (place + ending for ending in _BESIDE_LOG)
    if named.get("run_dir"):
        yield from (os.path.join(options.run_dir, name) for name in RUN_FILES)
    states = named.get("checkpoints")
    if states and os.path.isdir(states):
        yield from (os.path.join(states, name) for name in os.listdir(states))


def _is_same_file(one: str, other: str) -> bool:
    """Return whether two names are those of one file, which need not exist yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    exist = os.path.exists(one) and os.path.exists(other)
    return exist and os.path.samefile(one, other)
