"""The parser, made from the table of commands, with errors of one line.

Nothing here imports torch, opacus or matplotlib, so that ``--help`` answers at once; a
command's own module, which does, is imported by ``program`` when the command runs.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from opacus_pi import __version__
from opacus_pi.cli.arguments import TRACEBACK
from opacus_pi.cli.commands import COMMANDS
from opacus_pi.cli.declarations import Argument, Command, NoEffect
from opacus_pi.cli.errors import BAD_INPUT, one_line
from opacus_pi.cli.help_screen import one_screen

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)$")
# Names that the library's messages use and that are not the name of an argument here.
_OTHER_FLAGS = {
    "data_set": "--data",
    "indices": "--forget",
    "user": "--forget-person",
}

DESCRIPTION = """\
Per-instance privacy accounting and machine unlearning with Opacus. A training
with opacus_pi.PrivacyEngine leaves a ledger (engine.ledger.save). An import
path, package.module:name, runs the module: name only code that you trust."""
EPILOG = """\
example: opacus-pi score ledger.safetensors
'opacus-pi --help-all' adds the exit codes and a first session."""
MORE = """\
exit codes:
  0    success; verify: the file is complete and unedited
  1    a failure; verify: the file is damaged or edited; audit: a check failed
  2    bad arguments or unusable files: the message names argument and remedy
  3    verify: not checked: no opacus_pi file, no checksum, or too large
  130  interrupted

a first session:
  opacus-pi audit --model my_project:build --data my_project:train_set
  opacus-pi score ledger.safetensors
  opacus-pi plan ledger.safetensors --forget 3,17
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html"""
_SHAPE: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,  # an abbreviation would break when an option is added
}
_CODES = "exit codes: 0 success, 1 failure, 2 bad input; see 'opacus-pi --help-all'"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that suggests what was meant.

    Argparse by itself prints the whole usage before the error, and has no suggestions.
    """

    _unknown = ""  # what may have been meant by a flag that is not known

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with the code of bad input.

        Argparse calls this for every error. If a word was not one of the choices, the
        most similar one is suggested.

        Args:
            message: The message of argparse.
        """
        line = one_line(message)
        if choice := _CHOICE.search(line):
            line += _suggestion(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif "required" in line:
            line += self._unknown
        see = f"See '{self.prog} --help'."
        self.exit(BAD_INPUT, f"{self.prog}: {line}. {see}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words, as argparse does; note a misspelt flag before it does.

        If an argument is missing because its flag was misspelt, argparse only says that
        it is required.

        Args:
            args: The words.
            namespace: As for argparse.
        """
        known = [flag for action in self._actions for flag in action.option_strings]
        flags = [str(word).partition("=")[0] for word in args or ()]
        odd = [w for w in flags if w.startswith("--") and w not in (*known, "--")]
        hints = [f"; unrecognized: {word}{_suggestion(word, known)}" for word in odd]
        self._unknown = next((hint for hint in hints if "mean" in hint), "")
        return super().parse_known_args(args, namespace)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Report words that are left over, and what may have been meant.

        Two mistakes are frequent: a misspelled flag, and ids separated by spaces after
        ``--forget``, of which only the first belongs to the flag.

        Args:
            words: The words that no argument took.
        """
        message = f"unrecognized arguments: {' '.join(words)}"
        flags = [flag for action in self._actions for flag in action.option_strings]
        if words[0].startswith("-"):
            message += _suggestion(words[0].partition("=")[0], flags)
        elif "--forget" in flags and all(w.strip(",").isdigit() for w in words):
            message += ". Separate ids by commas, as in --forget 3,17"
        self.error(message)


Text = Callable[[Parser], str]


class _Help(argparse.Action):
    """Print a text and exit.

    Args:
        text: Returns the text of the parser that is passed to it.
        **options: Those of every argument.
    """

    def __init__(self, text: "Text", **options: Any) -> None:
        self.text = text
        super().__init__(nargs=0, **options)

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print the text, as argparse asks for when it meets the flag."""
        sys.stdout.write(self.text(parser))
        parser.exit()


def _suggestion(word: str, known: Sequence[str]) -> str:
    """Return the end of a message that suggests the most similar known word.

    Args:
        word: The word that was not recognised.
        known: The words that are valid in its place.

    Returns:
        The suggestion; empty if no known word is similar.
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}" if close else ""


def build_parser() -> Parser:
    """Return the parser of all commands, made from ``COMMANDS``.

    Every command sets ``flags`` in the options: the name of each argument as the user
    writes it, by its name in the library. ``errors.with_flags`` uses it in messages. It
    also sets ``program``, its name with the words before it, and ``refuse``, the method
    of its own parser that reports words left over: the parser of all commands does not
    know the flags of one command.
    """
    parser = Parser(
        prog="opacus-pi",
        usage="opacus-pi COMMAND ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        add_help=False,  # without a line of its own
        **_SHAPE,
    )
    _add_help(
        parser,
        lambda own: own.format_help(),
        lambda own: f"{own.format_help()}\n{MORE}\n",
        "with COMMAND: explain this command",
    )
    parser.add_argument(
        "--version", action="version", version=f"opacus-pi {__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        _add(commands, parser.prog, name, command)
    return parser


def _add(commands: Any, program: str, name: str, command: Command) -> None:
    """Add the parser of a command, and those of its actions.

    Args:
        commands: What ``add_subparsers`` of the parser above it returned.
        program: The words before the command's name.
        name: The command's name.
        command: Its declaration.
    """
    sub = commands.add_parser(
        name,
        help=command.summary,
        **_texts(f"{program} {name}", command, f"examples:\n{command.examples}"),
    )
    shown = "show this text" if command.actions else argparse.SUPPRESS
    _add_help(sub, _screen_of(command), lambda own: own.format_help(), shown)
    if command.actions:
        actions = sub.add_subparsers(
            metavar="ACTION",
            dest="action",
            required=True,
            help=f"'{sub.prog} ACTION --help' explains one action",
        )
        for action, declared in command.actions.items():
            _add(actions, sub.prog, action, declared)
        flags: dict[str, str] = {}
    else:
        flags = _add_arguments(sub, (*command.arguments, TRACEBACK))
    sub.set_defaults(
        refuse=sub.refuse,
        error=sub.error,
        program=sub.prog,
        flags={**flags, **_OTHER_FLAGS},
        no_effect=command.no_effect,
    )


def _texts(program: str, command: Command, last: str) -> dict[str, Any]:
    """Return the texts of a command's parser, and its shape.

    Args:
        program: The words that call the command.
        command: Its declaration.
        last: The last paragraph of its help.
    """
    return {
        "prog": program,
        "add_help": False,  # without a line of its own
        "usage": f"{program} {command.usage}",
        "description": command.description,
        "epilog": f"{last}\n{_CODES}",
        **_SHAPE,
    }


def _add_help(parser: Parser, screen: Text, everything: Text, shown: str) -> None:
    """Add the two helps of a parser.

    Args:
        parser: The parser.
        screen: Returns the help on one screen.
        everything: Returns the help with every argument.
        shown: What the first help says of itself.
    """
    for flags, text, own in (
        (("-h", "--help"), screen, shown),
        (("--help-all",), everything, argparse.SUPPRESS),
    ):
        default = argparse.SUPPRESS
        parser.add_argument(*flags, action=_Help, text=text, default=default, help=own)


def _screen_of(command: Command) -> Text:
    """Return a function from a command's parser to its help on one screen.

    Args:
        command: Its declaration.
    """

    def screen(parser: Parser) -> str:
        def formatted(arguments: Sequence[Argument], last: str) -> str:
            shown = Parser(**_texts(parser.prog, command, last))
            _add_arguments(shown, arguments)
            return shown.format_help()

        if command.actions:
            return parser.format_help()
        return one_screen(parser.prog, command, formatted)

    return screen


def _add_arguments(sub: Parser, declarations: Sequence[Argument]) -> dict[str, str]:
    """Add the arguments of a command; return their names as the user writes them.

    Args:
        sub: The command's parser.
        declarations: The arguments.
    """
    places: dict[bool, Any] = {False: sub}
    if any(declared.is_choice for declared in declarations):
        places[True] = sub.add_mutually_exclusive_group(required=True)
    actions = [
        places[declared.is_choice].add_argument(*declared.names, **declared.options)
        for declared in declarations
    ]
    return {a.dest: (a.option_strings or [str(a.metavar)])[-1] for a in actions}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, or exit with a message.

    Args:
        arguments: The words after the program's name; None: the words that this
            process was started with.

    Returns:
        The options. ``command`` is the command's name, and ``program`` has the words
        before it, too. ``flags`` is a dict from the
        library's name of each argument (``"noise_std"``) to its name on the command
        line (``"--sigma"``).

    Raises:
        SystemExit: After ``--help`` and ``--version``, and for bad arguments, such as
            an option that would change nothing.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options: argparse.Namespace
    options, left_over = build_parser().parse_known_args(words)
    if left_over:
        options.refuse(left_over)
    _require_effect(options, {word.partition("=")[0] for word in words})
    return options


def _require_effect(options: argparse.Namespace, given: set[str]) -> None:
    """Refuse an option that would change nothing in this command line.

    It could be left out, but the user expects an effect of it.

    Args:
        options: The parsed arguments.
        given: The words of the command line, without values after ``=``. A value that
            looks like an option is an error of argparse.

    Raises:
        SystemExit: If there is such an option.
    """

    def has(argument: str) -> bool:
        flag, _, value = argument.partition(" ")
        name = next((n for n, f in options.flags.items() if f == flag), "")
        found = getattr(options, name, None)
        is_given = flag in given if flag.startswith("--") else found is not None
        return is_given and value in ("", found)

    rules: tuple[NoEffect, ...] = options.no_effect
    for rule in rules:
        applies = not rule.beside or has(rule.beside)
        applies = applies and not (rule.without and has(rule.without))
        for flag in filter(has, rule.flags if applies else ()):
            options.error(f"{flag}: {rule.reason}".rstrip("."))
