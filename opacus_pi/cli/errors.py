"""Bad input is one line on the error stream that names the argument and the remedy."""

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

DONE, FAILED, BAD_INPUT, NOTHING_TO_CHECK, INTERRUPTED = 0, 1, 2, 3, 130
_NAMED = re.compile(r"^Expected (\w+)(?==)")
_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)$")


class BadInput(Exception):
    """What the user gave cannot be used; the message says what to give."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with the exit code of bad input."""
        said = one_line(message)
        if choice := _CHOICE.search(said):
            said += meant(choice[1], re.findall(r"[\w-]+", choice[2]))
        see = f"See '{self.prog} --help'."
        self.exit(BAD_INPUT, f"{self.prog}: {said}. {see}\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Say which words were not understood, and what may have been meant.

        Args:
            words: What was left over, at least one.
        """
        message = f"unrecognized arguments: {' '.join(words)}"
        flags = [flag for action in self._actions for flag in action.option_strings]
        if words[0].startswith("-"):
            message += meant(words[0].partition("=")[0], flags)
        elif "--forget" in flags and all(w.strip(",").isdigit() for w in words):
            message += ". Separate ids by commas, as in --forget 3,17"
        self.error(message)


def meant(word: str, known: Sequence[str]) -> str:
    """Words that offer the known one most like a given one; empty if none is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}" if close else ""


@contextmanager
def about(argument: str, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with a file or a value into an error about an argument.

    Args:
        argument: The argument, as the user writes it.
        remedy: One sentence: what the user can do about a file.

    Raises:
        BadInput: In place of an ``OSError`` or a ``ValueError``.
    """
    try:
        yield
    except FileNotFoundError as error:
        place = f": {error.filename}" if error.filename else ""
        raise BadInput(f"{argument}: no such file{place}. {remedy}") from error
    except OSError as error:
        raise BadInput(f"{argument}: {one_line(error)}. {remedy}") from error
    except ValueError as error:
        raise BadInput(f"{argument}: {one_line(error)}") from error


def one_line(error: BaseException | str) -> str:
    """A message without line breaks; the class's name where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def in_flags(error: ValueError, options: argparse.Namespace) -> str:
    """A library's message with the argument named as on the command line.

    Args:
        error: What the library raised; its messages begin ``Expected name=...``.
        options: The parsed arguments, with ``flags``: flags by the library's names.
    """
    flags: dict[str, str] = getattr(options, "flags", {})
    return _NAMED.sub(
        lambda found: f"Expected {flags.get(found[1], found[1])}", one_line(error)
    )


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Each argument's name in the library, and as the user writes it."""
    return {
        action.dest: action.option_strings[-1]
        if action.option_strings
        else str(action.metavar or action.dest)
        for action in parser._actions
    }
