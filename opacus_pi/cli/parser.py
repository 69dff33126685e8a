"""The arguments of every command, declared in one table, and the help texts.

``COMMANDS`` is the only description of the command line: the parser, the help, the
names in error messages and the tests are made from it. Nothing here imports torch,
opacus or matplotlib, so that ``--help`` answers at once; a command's own module, which
does, is imported by ``program`` when the command runs.
"""

import argparse
import difflib
import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from opacus_pi import __version__
from opacus_pi.cli.errors import BAD_INPUT, one_line
from opacus_pi.cli.methods import METHODS

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)$")
# Names that the library's messages use and that are not the name of an argument here.
_OTHER_FLAGS = {
    "data_set": "--data",
    "indices": "--forget",
    "user": "--forget-person",
}

DESCRIPTION = """\
Per-instance privacy accounting and machine unlearning with Opacus.

Training with opacus_pi.PrivacyEngine produces a ledger; engine.ledger.save(path) saves
it. The commands compute the privacy loss of every example from it, plan and carry out
unlearning, compare the result with retrained models, write a report, and verify files.
An import path, package.module:name, runs the module: name only code that you trust."""
EPILOG = """\
exit codes:
  0    success; verify: the file is complete and unedited
  1    a failure; verify: the file is damaged or edited; audit: a comparison failed
  2    bad arguments or unusable files: the message names the argument and the remedy
  3    verify: not checked: no opacus_pi file, no checksum, or too large
  130  interrupted

a first session:
  opacus-pi audit --model my_project:build --data my_project:train_set
  opacus-pi score ledger.safetensors
  opacus-pi plan ledger.safetensors --forget 3,17
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html

'opacus-pi COMMAND --help' explains one command."""
_CODES = (
    "exit codes: 0 success, 1 failure, 2 bad arguments or files; "
    "more in 'opacus-pi --help'"
)


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
class Command:
    """One command.

    Args:
        summary: What it does, for the list of commands.
        usage: The required arguments, for the first line of its help.
        description: What it does, in a few sentences.
        examples: Command lines that can be run.
        arguments: All arguments, in the order of the help.
    """

    summary: str
    usage: str
    description: str
    examples: str
    arguments: tuple[Argument, ...]


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
    shown = "" if default in (None, []) else f" (default {default})"
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


LEDGERS = option(
    "ledger",
    "LEDGER",
    "saved ledger; independent runs are averaged",
    nargs="+",
)
LEDGERS_BY_FLAG = Argument(("--ledger",), {**LEDGERS.options, "default": []})
FORGET = replace(
    option(
        "--forget",
        "IDS|FILE",
        "positions in the training set: 3,17,25 or a file",
        dest="forget_indices",
    ),
    is_choice=True,
)
FORGET_PERSON = replace(
    option(
        "--forget-person",
        "ID",
        "in place of --forget: a person in --owners; repeatable",
        default=[],
        action="append",
    ),
    is_choice=True,
)
OWNERS = option("--owners", "FILE.json", 'positions by person: {"p03": [3, 17]}')
ORDER = option("--order", "X", "Rényi order, above 1", float, 8.0)
SIGMA = option(
    "--sigma",
    "X",
    "noise std to assume on the SUM of gradients, to rank",
    float,
    dest="noise_std",
)
DELTA = option("--delta", "X", "δ of every ε", probability, 1e-5)
TOLERANCE = option(
    "--tolerance",
    "X",
    "save time: round losses and ε up, by at most this relative error; default: 1e-3 "
    "for a run with more than 16,384 norms (rows times examples), else 0, which is "
    "exact",
    float,
)
TOP = partial(option, "--top", "N", "number of hardest examples to list", whole_number)
BATCH_SIZE = option("--batch-size", "N", "examples in a batch", whole_number, 64)
MODEL = option(
    "--model",
    "M:NAME",
    "import path of the model, or of a function making it",
    required=True,
)
WEIGHTS = option("--weights", "FILE", "state dict, .safetensors or .pt", required=True)
DEVICE = option("--device", "NAME", "cpu, cuda, cuda:1, ...", default="cpu")
DATA = option(
    "--data",
    "M:NAME",
    "import path of the training set, or of its function",
    dest="train_set",
    required=True,
)
TEST = option(
    "--test", "M:NAME", "import path of the test set, for metrics", dest="test_set"
)
CRITERION = option(
    "--criterion",
    "M:NAME",
    "import path of the loss",
    default="torch.nn:CrossEntropyLoss",
)
SEED = option(
    "--seed",
    "N",
    "seed of all noise; keep it secret (default: random)",
    int,
)
METHOD = option(
    "--method",
    "NAME",
    f"{', '.join(METHODS)} (default finetune; bounds: the first 3)",
    choices=METHODS,
)
SETTING = option(
    "--set",
    "NAME=VALUE",
    "setting of the method; a wrong NAME shows the list",
    dest="settings",
    default=[],
    action="append",
)
CHECKPOINTS = option(
    "--checkpoints",
    "DIR",
    "saved states of the training: go back to one of them",
)
POLICY = switch(
    "--policy",
    "go back only as far as the deletion policy demands",
).but(dest="use_policy")
LOG = option(
    "--log",
    "FILE.db",
    "deletion log of the model; made if there is none",
)
JSON = switch("--json", "print JSON instead of text")
JSON_FILE = option(
    "--out", "FILE.json", "write the JSON here, too", writable_file, dest="json_file"
)
CSV = option(
    "--csv",
    "FILE.csv",
    "write loss and ε of every example here, for a spreadsheet",
    writable_file,
)
TRACEBACK = switch("--traceback", "show where an error occurred")

COMMANDS = {
    "audit": Command(
        summary="check before training that norms are recorded correctly",
        usage="--model M:NAME --data M:NAME [options]",
        description="""\
Compare what private training would record for a batch with the gradients of its
examples one by one. Also tested: whether the loss is the mean of the examples' own
losses, and whether an output depends on its own example only. Nothing is trained.

Exit code 0: no comparison failed. 1: one failed; its line says what to do.""",
        examples="""\
  opacus-pi audit --model my_project:build --data my_project:train_set
  opacus-pi audit --model my_project:build --data my_project:train_set \\
      --criterion torch.nn:CrossEntropyLoss --mode fast --examples 32""",
        arguments=(
            MODEL,
            WEIGHTS.but(
                required=False,
                help="state dict (default: the weights that the model is built with)",
            ),
            DATA,
            CRITERION,
            option(
                "--mode",
                "NAME",
                "grad_sample_mode of make_private: hooks, fast, functorch or ghost",
                default="hooks",
                choices=("hooks", "fast", "functorch", "ghost"),
            ),
            option(
                "--examples",
                "N",
                "examples to compare, at most 32",
                whole_number,
                16,
                dest="num_examples",
            ),
            DEVICE,
            JSON,
            JSON_FILE,
        ),
    ),
    "score": Command(
        summary="privacy losses and epsilons of all examples, the hardest by id",
        usage="LEDGER [LEDGER ...] [options]",
        description="""\
Compute the Rényi privacy loss and (ε, δ) of every example from the ledger of a
training. The values of single examples are estimates; only the worst case is a bound.
An example with a higher loss changed the model more and is expected to be harder to
forget. If training added no noise, assume one (--sigma): this ranks the examples and
gives no ε. The output reveals which examples are unusual: protect it like the data.""",
        examples="""\
  opacus-pi score ledger.safetensors
  opacus-pi score run1.safetensors run2.safetensors --order 8 --delta 1e-5
  opacus-pi score ledger.safetensors --owners owners.json
  opacus-pi score plain_sgd.safetensors --sigma 1 --top 50 --csv scores.csv""",
        arguments=(
            LEDGERS,
            ORDER,
            SIGMA,
            DELTA,
            TOLERANCE,
            TOP(10),
            OWNERS.but(help='rank persons, too; positions by person: {"p03": [3, 17]}'),
            JSON,
            JSON_FILE,
            CSV,
        ),
    ),
    "plan": Command(
        summary="difficulty, steps and kind of guarantee of a forget set",
        usage="LEDGER [LEDGER ...] --forget IDS|FILE [options]",
        description="""\
Predict what forgetting a set will take; nothing is trained. The plan gives the
percentile of the set's mean privacy loss among all examples, the number of steps that
past runs predict (--past), and, if the architecture is named (--model), what may be
claimed afterwards. With the saved states of the training (--checkpoints) it also says
how far a rewind goes back, what it costs, and what it proves. If there were deletion
requests before, name their log (--log): the guarantee then covers all requests.""",
        examples="""\
  opacus-pi plan ledger.safetensors --forget 17
  opacus-pi plan ledger.safetensors --forget 5 --past 200=0.5 --past 232=12
  opacus-pi plan ledger.safetensors --forget 17 --model my_project:build \\
      --checkpoints states --policy
  opacus-pi plan ledger.safetensors --forget-person p03 --owners owners.json""",
        arguments=(
            LEDGERS,
            FORGET,
            FORGET_PERSON,
            OWNERS,
            ORDER,
            SIGMA,
            DELTA,
            MODEL.but(required=False),
            METHOD,
            SETTING,
            option(
                "--past",
                "IDS=EPOCHS",
                "an earlier run; 25+ if 25 epochs were not enough",
                default=[],
                action="append",
            ),
            CHECKPOINTS.but(help="saved states of the training, for a rewind"),
            POLICY,
            LOG.but(help="deletion log of earlier requests; it is only read"),
            BATCH_SIZE,
            JSON,
            JSON_FILE,
        ),
    ),
    "unlearn": Command(
        summary="forget a set of training examples",
        usage="--model M --weights FILE --data M --forget IDS --out DIR [options]",
        description="""\
Fine-tune a model on the other examples by a method, or with --checkpoints go back to a
saved state and repeat the training without the forget set. DIR gets weights, record,
trace (needs --test) and guarantee (stronger with --ledger). --log enters the request in
a tamper-evident log first: after a crash, repeat the command.""",
        examples="""\
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten""",
        arguments=(
            MODEL,
            WEIGHTS,
            DATA,
            FORGET,
            FORGET_PERSON,
            OWNERS,
            option(
                "--out",
                "DIR",
                "new directory to write",
                new_directory_name,
                required=True,
            ),
            TEST,
            CRITERION.but(help="import path of the loss (default cross-entropy)"),
            DEVICE,
            SEED,
            METHOD,
            SETTING,
            option(
                "--epochs",
                "N",
                "passes over the retain set",
                whole_number,
                25,
                dest="num_epochs",
            ),
            BATCH_SIZE,
            option("--learning-rate", "X", "learning rate of SGD", float, 0.01),
            option("--momentum", "X", "momentum of SGD", float, 0.9),
            LEDGERS_BY_FLAG,
            CHECKPOINTS,
            POLICY,
            DELTA,
            LOG,
            option(
                "--request-id",
                "NAME",
                "name of the request (default: a hash of the ids)",
            ),
            JSON,
        ),
    ),
    "evaluate": Command(
        summary="metrics of a model, compared with retrained models",
        usage="--model M:NAME --weights FILE --data M:NAME --test M:NAME\n"
        "                          --forget IDS|FILE [options]",
        description="""\
Compute a model's accuracy, loss, confidence and membership inference on the forget set,
the retain set and the test set. Of the retain set, a part is used that is at most as
large as the test set. The values to reach are those of models that were retrained
without the forget set: name their weights (--oracle) to see them beside the model's,
and the loss barriers to them.""",
        examples="""\
  opacus-pi evaluate --model my_project:build --weights forgotten/weights.safetensors \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt
  opacus-pi evaluate --model my_project:build --weights forgotten/weights.safetensors \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt \\
      --oracle retrained1.pt retrained2.pt --match --out forgotten/evaluation.json""",
        arguments=(
            MODEL,
            WEIGHTS,
            DATA,
            TEST.but(required=True),
            FORGET,
            FORGET_PERSON,
            OWNERS,
            LOG.but(
                help="deletion log of the model; examples of earlier requests are not "
                "in the retain set, and may have been erased from --data"
            ),
            option(
                "--oracle",
                "WEIGHTS",
                "state dicts of models retrained without the forget set; repeatable",
                default=[],
                nargs="+",
                action="extend",
            ),
            switch(
                "--match",
                "with --oracle: match hidden units before measuring loss barriers",
            ),
            CRITERION,
            DEVICE,
            SEED.but(
                help="seed of the draw from the retain set (default 0)", default=0
            ),
            JSON,
            JSON_FILE,
        ),
    ),
    "report": Command(
        summary="one self-contained HTML page, and JSON, about a run",
        usage="[RUN_DIR] --ledger LEDGER [LEDGER ...] --out FILE.html [options]",
        description="""\
Write the distributions of ε and loss, the hardest examples (ids only), the strata, the
unlearning run beside retrained models, and the guarantee with its assumptions as one
HTML file without links to other files, and the same facts as JSON beside it. Existing
files of these names are overwritten. RUN_DIR is the directory that 'opacus-pi unlearn
--out' wrote; without it the report covers the training alone.""",
        examples="""\
  opacus-pi report --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors --out report.html
  opacus-pi report forgotten --ledger ledger.safetensors \\
      --evaluation forgotten/evaluation.json --out report.html""",
        arguments=(
            option("run_dir", "RUN_DIR", "directory of an unlearning run", nargs="?"),
            LEDGERS_BY_FLAG.but(required=True),
            option(
                "--out", "FILE.html", "name of the page", writable_file, required=True
            ),
            option(
                "--evaluation",
                "FILE.json",
                "output of 'opacus-pi evaluate --out' (default "
                "RUN_DIR/evaluation.json if it exists)",
            ),
            ORDER,
            SIGMA,
            DELTA,
            TOLERANCE,
            TOP(20),
            option(
                "--title", "TEXT", "heading", default="Privacy and unlearning report"
            ),
            JSON,
        ),
    ),
    "heads": Command(
        summary="accuracy and cost of heads that forget with a certificate",
        usage="--model M:NAME --data M:NAME --classes N [options]",
        description="""\
Train a linear head with noise on the features of a frozen model, and say how accurate
it is and how many more noisy steps it takes until an example or a set is forgotten with
a certificate. The model must not have been trained on examples that you may have to
forget. Nothing is written: to train a head that you release, see
'Heads that forget with a certificate' in the documentation.""",
        examples="""\
  opacus-pi heads --model my_project:features --data my_project:train_set --classes 10
  opacus-pi heads --model my_project:features --data my_project:train_set \\
      --test my_project:test_set --classes 10 --head softmax --forget 3,17""",
        arguments=(
            MODEL.but(help="import path of the frozen model, which returns features"),
            WEIGHTS.but(
                required=False,
                help="state dict (default: the weights that the model is built with)",
            ),
            DATA,
            TEST.but(help="import path of the test set, for the accuracy"),
            option(
                "--classes",
                "N",
                "number of classes",
                whole_number,
                dest="num_classes",
                required=True,
            ),
            option(
                "--head",
                "NAME",
                "ridge (exact ε) or softmax (upper bounds)",
                default="ridge",
                choices=("ridge", "softmax"),
            ),
            option(
                "--noise-std",
                "X",
                "noise std of a step, on every weight (ridge 0.001, softmax 0.02)",
                float,
            ),
            option(
                "--steps",
                "N",
                "training steps (ridge 1000, softmax 300)",
                whole_number,
                dest="num_steps",
            ),
            option(
                "--regularisation",
                "X",
                "λ of the penalty (λ/2)‖w‖² (ridge 0.01, softmax 0.003)",
                float,
            ),
            option(
                "--epsilon",
                "X",
                "ε to reach, in both directions between unlearned and retrained",
                float,
                1.0,
            ),
            DELTA,
            replace(FORGET, is_choice=False).but(
                help="a set to forget together: 3,17,25 or a file"
            ),
            TOP(10),
            SEED,
            DEVICE,
            JSON,
            JSON_FILE,
        ),
    ),
    "verify": Command(
        summary="check a file for damage and edits",
        usage="FILE [HEAD] [options]",
        description="""\
Recognise the kind of a file from its content, and check that it is complete and
unedited. In a deletion log, every entry's hash and its link to the entry before are
checked. The links cannot show that the last entries were removed: keep the hash of the
last entry (the head) elsewhere and pass it as HEAD. Ledgers, Gram ledgers, oracles,
traces, guarantees, records of runs, recorded or unlearned weights and the ledger in a
checkpoint have a checksum. Reports and answers have none: make them again and compare.
A checksum finds damage and careless edits; it is not a signature.

Exit code 0: verified. 1: damaged or edited. 2: bad arguments, or no such file. 3: not
checked: it is not an opacus_pi file, has no checksum or is too large.""",
        examples="""\
  opacus-pi verify ledger.safetensors
  opacus-pi verify deletions.db
  opacus-pi verify deletions.db 5f0c...e1""",
        arguments=(
            option("file", "FILE", "file to check"),
            option(
                "head",
                "HEAD",
                "hash that an entry of the deletion log must have",
                nargs="?",
            ),
            JSON,
        ),
    ),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that suggests what was meant.

    Argparse by itself prints the whole usage before the error, and has no suggestions.
    """

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
        see = f"See '{self.prog} --help'."
        self.exit(BAD_INPUT, f"{self.prog}: {line}. {see}\n")

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
    also sets ``refuse``, the method of its own parser that reports words left over: the
    parser of all commands does not know the flags of one command.
    """
    shape: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,  # an abbreviation would break when an option is added
    }
    parser = Parser(prog="opacus-pi", description=DESCRIPTION, epilog=EPILOG, **shape)
    parser.add_argument(
        "--version", action="version", version=f"opacus-pi {__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            add_help=False,  # declared below, without a line of its own
            help=command.summary,
            usage=f"opacus-pi {name} {command.usage}",
            description=command.description,
            epilog=f"examples:\n{command.examples}\n{_CODES}",
            **shape,
        )
        sub.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        declarations = (*command.arguments, TRACEBACK)
        places: dict[bool, Any] = {False: sub}
        if any(declared.is_choice for declared in declarations):
            places[True] = sub.add_mutually_exclusive_group(required=True)
        actions = [
            places[declared.is_choice].add_argument(*declared.names, **declared.options)
            for declared in declarations
        ]
        flags = {a.dest: (a.option_strings or [str(a.metavar)])[-1] for a in actions}
        sub.set_defaults(refuse=sub.refuse, flags={**flags, **_OTHER_FLAGS})
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, or exit with a message.

    Args:
        arguments: The words after the program's name; None: the words that this
            process was started with.

    Returns:
        The options. ``command`` is the command's name. ``flags`` is a dict from the
        library's name of each argument (``"noise_std"``) to its name on the command
        line (``"--sigma"``).

    Raises:
        SystemExit: After ``--help`` and ``--version``, and for bad arguments.
    """
    options, left_over = build_parser().parse_known_args(arguments)
    if left_over:
        options.refuse(left_over)
    return options
