"""How commands and arguments are declared, and the checks of single words.

An argument is declared once, as data: the parser, the help and the names in error
messages are made from it. Nothing here imports torch.
"""

import argparse
import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import hexdigits
from typing import Any

_LENGTH_OF_HASH = 64  # SHA-256, in hexadecimal digits


@dataclass(frozen=True)
class Argument:
    """One argument, as ``add_argument`` of argparse takes it.

    Args:
        names: The positional arguments of ``add_argument``: flags, or one plain name.
        options: Its keyword arguments.
        is_choice: Whether exactly one of a command's arguments of this kind must be
            given.
    """

    names: tuple[str, ...]
    options: dict[str, Any]
    is_choice: bool = False

    def but(self, **options: Any) -> "Argument":
        """Return the same argument with some options replaced.

        Commands share one declaration of an argument, so that it means the same
        everywhere. A command that needs it optional, or explains it in its own words,
        changes only that.

        Args:
            **options: The options to replace, as ``add_argument`` names them.
        """
        return replace(self, options={**self.options, **options})


@dataclass(frozen=True)
class NoEffect:
    """Options that would change nothing in some command lines, and are refused there.

    Args:
        flags: The options.
        reason: Why they change nothing, and what to write instead.
        beside: They change nothing beside this option, which may have a value:
            ``"--method ssd"``.
        without: They change nothing if this argument is missing.
    """

    flags: tuple[str, ...]
    reason: str
    beside: str = ""
    without: str = ""


@dataclass(frozen=True)
class Command:
    """One command, or one action of a command.

    Args:
        summary: What it does, for the list of commands.
        usage: The required arguments, for the first line of its help.
        description: What it does, in a few sentences.
        examples: Command lines that can be run.
        arguments: All arguments, in the order of the help.
        no_effect: Which of them change nothing, and when.
        actions: If the command is a group, its actions by name; one must be named.
    """

    summary: str
    usage: str
    description: str
    examples: str
    arguments: tuple[Argument, ...] = ()
    no_effect: tuple[NoEffect, ...] = ()
    actions: Mapping[str, "Command"] = field(default_factory=dict)


def option(
    flag: str,
    metavar: str,
    text: str,
    convert: Callable[[str], Any] = str,
    default: Any = None,
    **more: Any,
) -> Argument:
    """Declare an argument with a value.

    Args:
        flag: Its name on the command line.
        metavar: What stands for the value in the help.
        text: What the argument is; a default is added to it.
        convert: From the word on the command line to the value.
        default: The value if the argument is missing.
        **more: Further options of ``add_argument``.
    """
    shown = "" if default in (None, [], "") else f" (default {default})"
    options = {"metavar": metavar, "type": convert, "default": default, **more}
    return Argument((flag,), {**options, "help": text + shown})


def switch(flag: str, text: str) -> Argument:
    """Declare an argument without a value; it is False unless it is given.

    Args:
        flag: Its name on the command line.
        text: What it does.
    """
    return Argument((flag,), {"action": "store_true", "help": text})


def whole_number(text: str) -> int:
    """Convert an argument to a whole number of at least 1.

    >>> whole_number("12")
    12

    Args:
        text: The word on the command line.

    Raises:
        ArgumentTypeError: If it is anything else; argparse puts the flag before it.
    """
    number = int(text) if text.strip().isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of at least 1"
        )
    return number


def hash_word(text: str) -> str:
    """Convert an argument to the hash of an entry, as deletion logs write it.

    >>> hash_word(" " + 32 * "0A")[:4]
    '0a0a'

    Args:
        text: The word on the command line. Capitals and blanks around it are allowed,
            as they come with pasted text.

    Raises:
        ArgumentTypeError: If it is anything else; argparse puts the name before it.
    """
    word = text.strip().lower()
    if len(word) != _LENGTH_OF_HASH or set(word) - set(hexdigits):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a hash of {_LENGTH_OF_HASH} digits from 0 to 9 and a to "
            f"f (it has {len(word)} characters). Copy the whole hash, as 'opacus-pi "
            "log list' or 'opacus-pi verify' printed it"
        )
    return word


def probability(text: str) -> float:
    """Convert an argument to a number between 0 and 1, both excluded.

    Args:
        text: The word on the command line.

    Raises:
        ArgumentTypeError: If it is anything else, NaN included.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def number_of_examples(text: str) -> int:
    """Convert an argument to the number of examples of an audit.

    Args:
        text: The word on the command line.

    Raises:
        ArgumentTypeError: If an audit cannot compare as many.
    """
    number = whole_number(text)
    if not 2 <= number <= 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 2 to 32")
    return number


def writable_file(text: str) -> str:
    """Accept the name of a file that can be created.

    It is checked while arguments are parsed, so that a misspelled directory is reported
    before minutes of computation and not after.

    Args:
        text: The word on the command line.

    Raises:
        ArgumentTypeError: If it is a directory, or is to be in one that does not exist.
    """
    if reason := _impossible(text):
        pass
    elif os.path.isdir(text):
        reason = "it is a directory"
    elif not (directory := Path(os.path.abspath(text)).parent).is_dir():
        reason = f"{directory} is not a directory"
    else:
        return text
    raise argparse.ArgumentTypeError(
        f"{text} cannot be written: {reason}. Name a file in a directory that exists"
    )


def new_directory_name(text: str) -> str:
    """Accept the name of a directory, unless no file system could have it.

    Args:
        text: The word on the command line.

    Raises:
        ArgumentTypeError: If it is too long or contains a character that no name has.
    """
    if reason := _impossible(text):
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written: {reason}. Choose another name"
        )
    return text


def _impossible(text: str) -> str:
    """Return why no file can have a name; empty if one can.

    >>> _impossible("a" * 1000)
    'File name too long'
    """
    try:
        os.lstat(text)
    except OSError as error:
        return str(error.strerror) if error.errno == errno.ENAMETOOLONG else ""
    except ValueError as error:
        return str(error)
    return ""
