"""The program: sub-commands, exit codes, errors of one line."""

import argparse
import os
import sys
from collections.abc import Sequence

from opacus_pi._errors import AccountingError
from opacus_pi.cli import evaluate, plan, report, score, unlearn, verify
from opacus_pi.cli.arguments import checked_output
from opacus_pi.cli.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    BadInput,
    Parser,
    flags_of,
    in_flags,
    one_line,
)

COMMANDS = {
    "score": score,
    "plan": plan,
    "unlearn": unlearn,
    "evaluate": evaluate,
    "report": report,
    "verify": verify,
}
_DESCRIPTION = """\
What each training example costs in privacy, and what it takes to forget it.

Training with opacus_pi.PrivacyEngine leaves a ledger (engine.ledger.save(path)). From
it: score the examples, plan a forget set, unlearn it, evaluate the result beside
retrained models, report on it, verify the files. Models and data sets are named by
import path, package.module:name; that module is run, so name only your own."""
_EPILOG = """\
exit codes:
  0    done; verify: the file is whole and unedited
  1    verify: it is not; else: something failed while running
  2    bad arguments or unusable files: one line on the error stream says which
       argument, and what to do
  3    verify: there is nothing in the file to check, as it is none of ours or one
       without a checksum
  130  interrupted

a first session:
  opacus-pi score ledger.safetensors
  opacus-pi plan ledger.safetensors --forget 3,17
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html

'opacus-pi COMMAND --help' has examples of each."""

_OTHER_NAMES = {"data_set": "--data", "indices": "--forget"}


def build_parser() -> Parser:
    """The parser of all sub-commands."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="opacus-pi",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=shape,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=shape,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument(
            "--traceback", action="store_true", help="show where an error came from"
        )
        command.set_defaults(
            run=module.run,
            command=command.prog,
            refuse=command.refuse,
            flags={**flags_of(command), **_OTHER_NAMES},
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; default: the process's.

    Returns:
        The exit code: see ``opacus-pi --help``.
    """
    try:
        options, left_over = build_parser().parse_known_args(arguments)
        if left_over:
            options.refuse(left_over)
    except SystemExit as end:  # --help, or bad arguments, already said
        return int(end.code or 0)
    try:
        checked_output(options)
        return int(options.run(options))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return _say(options, "interrupted", INTERRUPTED)
    except Exception as error:
        if options.traceback:
            raise
        return _say(options, *_explained(error, options))


def _explained(error: Exception, options: argparse.Namespace) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, BadInput):
        return str(error), BAD_INPUT
    if isinstance(error, ValueError):
        return in_flags(error, options), BAD_INPUT
    if isinstance(error, AccountingError | OSError):
        return one_line(error), BAD_INPUT
    name = type(error).__name__
    return (
        f"{name}: {one_line(error)[:300]} Run again with --traceback to see where.",
        FAILED,
    )


def _say(options: argparse.Namespace, message: str, code: int) -> int:
    """One line on the error stream."""
    print(f"{options.command}: {message}", file=sys.stderr)
    return code
