r"""Exit codes, and errors that name the argument and the remedy in one line.

The library names its own arguments in its messages, such as ``noise_std``. On the
command line the same argument may be called ``--sigma``, so ``about`` and
``with_flags`` put the name there that the user wrote.

>>> one_line("cannot\n    be read")
'cannot be read'
>>> options = argparse.Namespace(flags={"noise_std": "--sigma"})
>>> with_flags(ValueError("noise_std must be above 0, got -1."), options)
'--sigma must be above 0, got -1.'
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager

from opacus_pi._printable import printable

DONE, FAILED, BAD_INPUT, NOTHING_TO_CHECK, INTERRUPTED = 0, 1, 2, 3, 130
_OF_RUNS, _RUN = "The runs of the ledger ", re.compile(r"\brun (\d+)\b")
_COLLATE = re.compile(r"\bcollate_fn(=\.\.\.|(?= was given| cannot make))")
_ANY_COLLATE = "Pass a collate_fn that"
_NAMED = re.compile(r"^\w+(?= must | ')")


class BadInput(Exception):
    """An argument or a file cannot be used; the message says what to give instead.

    The program prints it as one line, without a traceback, and exits with code 2. Raise
    it only for what the user can correct; any other error is a failure with code 1.
    """


@contextmanager
def about(argument: str, remedy: str) -> Iterator[None]:
    """Turn an error about a file or a value into one that names the argument.

    Wrap the smallest part that reads the file: an error of the user's own code inside
    the block would be reported as a problem of the file. A ``BadInput`` passes through.

    Args:
        argument: The argument, as the user writes it.
        remedy: One sentence: what the user can do about a file. An error of the library
            about a value has its own remedy.

    Raises:
        BadInput: Instead of an ``OSError`` or a ``ValueError``.
    """
    try:
        yield
    except FileNotFoundError as error:
        if not error.filename:  # raised by the library, with a remedy
            raise BadInput(f"{argument}: {one_line(error)}") from error
        what = f"no such file: {error.filename}"
        raise BadInput(f"{argument}: {what}. {remedy}") from error
    except OSError as error:
        raise BadInput(f"{argument}: {one_line(error)}. {remedy}") from error
    except ValueError as error:
        raise BadInput(f"{argument}: {one_line(error)}") from error


def one_line(error: BaseException | str) -> str:
    """Return a message in one printable line, or the class's name if it is empty."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def with_flags(error: ValueError, options: argparse.Namespace) -> str:
    """Return a message of the library, with the names of the command line.

    The argument gets its name there, and one of several runs the name of its ledger.

    Args:
        error: What the library raised; its messages begin with the argument's name,
            before "must" or the value in quotes.
        options: The parsed arguments, with ``flags``: flags by the library's names.
    """
    flags: dict[str, str] = options.flags
    text = _NAMED.sub(lambda found: flags.get(found[0], found[0]), one_line(error))
    if text.startswith(_OF_RUNS) and isinstance(getattr(options, "ledger", None), list):
        files = dict(enumerate(options.ledger))
        text = _RUN.sub(lambda found: files.get(int(found[1]), found[0]), text)
    return text


def with_collate(message: str, options: argparse.Namespace) -> str:
    """Return a message in which ``collate_fn`` has its name on the command line.

    Args:
        message: Of the library, or another one.
        options: As for ``with_flags``.

    >>> options = argparse.Namespace(flags={"collate_fn": "--collate"})
    >>> with_collate(
    ...     "No collate_fn was given. Pass collate_fn=..., a function", options
    ... )
    'No --collate was given. Pass --collate M:NAME, a function'
    """
    flag = options.flags.get("collate_fn")
    if flag is None:
        return message
    message = message.replace(_ANY_COLLATE, f"Pass {flag} M:NAME, a function that")
    return _COLLATE.sub(lambda found: flag + " M:NAME" * bool(found[1]), message)
