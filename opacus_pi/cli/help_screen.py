"""The help of a command on one screen: 24 lines of 80 characters.

A command with many arguments shows those that must be given, then the first of the
others, as many as fit. The rest are named in the last lines; ``--help-all`` explains
every one.
"""

import textwrap
from collections.abc import Callable, Sequence

from opacus_pi.cli.declarations import Argument, Command

SCREEN = 24  # lines
_WIDTH = 78  # characters of a line that is wrapped here

Formatted = Callable[[Sequence[Argument], str], str]


def one_screen(program: str, command: Command, formatted: Formatted) -> str:
    """Return the help of a command, of at most ``SCREEN`` lines if that can be.

    Args:
        program: The words that call the command.
        command: Its declaration.
        formatted: From arguments and a last paragraph to the text of argparse.
    """
    whole = formatted(command.arguments, f"examples:\n{command.examples}")
    if _fits(whole):
        return whole
    ranked = sorted(command.arguments, key=lambda argument: not _is_needed(argument))
    example = f"example:\n{_first(command.examples)}"
    for number in range(len(ranked), -1, -1):
        chosen = [one for one in command.arguments if one in ranked[:number]]
        left = [one for one in command.arguments if one not in ranked[:number]]
        more = textwrap.fill(
            f"more: {' '.join(one.names[-1] for one in left)}",
            width=_WIDTH,
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        see = f"'{program} --help-all' explains every option."
        text = formatted(chosen, f"{more}\n{see}\n{example}" if left else example)
        if _fits(text) or not number:
            break
    return text


def _fits(text: str) -> bool:
    """Return whether a text fits on one screen."""
    return len(text.splitlines()) <= SCREEN


def _is_needed(argument: Argument) -> bool:
    """Return whether an argument, or another of its choice, must be given."""
    is_positional = not argument.names[0].startswith("-")
    return is_positional or argument.is_choice or bool(argument.options.get("required"))


def _first(examples: str) -> str:
    """Return the first example, with the lines that continue it."""
    lines = examples.splitlines()
    ends = [number for number, line in enumerate(lines) if not line.endswith("\\")]
    return "\n".join(lines[: ends[0] + 1])
