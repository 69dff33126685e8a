"""Run one command: import its module, and turn every error into an exit code.

Errors are one line, without a traceback, because most of them are about an argument or
a file and the user can correct them (exit code 2). Everything else is a failure while
running (exit code 1); ``--traceback`` shows where it occurred.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from opacus_pi._errors import AccountingError, LogInUseError
from opacus_pi._printable import printable
from opacus_pi.cli.encoding import printing_all
from opacus_pi.cli.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    BadInput,
    one_line,
    with_collate,
    with_flags,
)
from opacus_pi.cli.parser import parse
from opacus_pi.cli.said_once import warnings_as_lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; None: those of the process.

    Returns:
        The exit code: see ``opacus-pi --help``.
    """
    try:
        with printing_all():
            return _run(arguments)
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe. Python would fail again when it
        # flushes the standard output at exit, so that goes to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _run(arguments: Sequence[str] | None) -> int:
    """Run one command, as ``main`` does, on streams that print everything."""
    try:
        options = parse(arguments)
    except SystemExit as end:  # the parser has printed help or what is wrong
        return int(end.code or 0)
    try:
        with warnings_as_lines():
            # These import torch, which --help does not wait for.
            named_files = import_module("opacus_pi.cli.named_files")
            named_files.require_separate_outputs(options)
            command = import_module(f"opacus_pi.cli.{options.command}")
            return int(command.run(options))
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _report(options, "interrupted", INTERRUPTED)
    except Exception as error:  # models and data sets are the user's code: anything
        if options.traceback:
            raise
        return _report(options, *_explained(error, options))


def _explained(error: Exception, options: argparse.Namespace) -> tuple[str, int]:
    """Return the message about an error, and the exit code.

    Code 2 means that other arguments or files will help. The library raises
    ``ValueError`` for values and ``AccountingError`` for ledgers that do not allow a
    number; an ``OSError`` is about a file. Everything else is code 1, with the way to
    see where it happened.

    Args:
        error: What the command raised.
        options: The parsed arguments, to name the flag in place of the library's name.
    """
    if isinstance(error, BadInput):
        return str(error), BAD_INPUT
    if isinstance(error, ValueError):
        return with_flags(error, options), BAD_INPUT
    if isinstance(error, AccountingError | OSError):
        return one_line(error), BAD_INPUT
    if isinstance(error, LogInUseError):
        return one_line(error), FAILED
    name = type(error).__name__
    return (
        f"{name}: {one_line(error)[:300]} Run again with --traceback to see where.",
        FAILED,
    )


def _report(options: argparse.Namespace, message: str, code: int) -> int:
    """Print one line on the error stream, and return the exit code.

    The standard output remains empty after an error, so that a program that reads JSON
    from it does not get words.

    Args:
        options: The parsed arguments, for the command's name.
        message: One line.
        code: The exit code.
    """
    more = getattr(options, "after_error", "")
    text = with_collate(message, options) + f" {more}" * bool(more)
    print(f"{options.program}: {printable(text)}", file=sys.stderr)
    return code
