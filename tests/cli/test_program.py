"""Help that teaches, exit codes, one-line errors, the program as a process."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import opacus_pi
from opacus_pi.cli import main
from opacus_pi.cli.commands import COMMANDS
from opacus_pi.cli.parser import build_parser
from tests.cli.conftest import DATA, MODEL

ROOT = Path(__file__).parents[2]
# Each command, and each action of a command, as the words that name it.
NAMES = [
    (name, *action)
    for name, command in COMMANDS.items()
    for action in [(), *((one,) for one in command.actions)]
]


def fits(text, width):
    lines = text.splitlines()
    return len(lines) <= 24 and max(map(len, lines)) <= width


def examples_in(text):
    """The command lines of a help, as words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  opacus-pi ")]


@pytest.mark.parametrize("width", [80, 100])
def test_help_lists_the_commands_and_where_more_is(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run("--help")
    assert (code, err) == (0, "") and fits(out, width)
    assert all(f"\n    {name} " in out for name in COMMANDS)
    code, more, err = run("--help-all")
    assert (code, err) == (0, "") and more.startswith(out)
    assert "exit codes:" in more and "a first session:" in more
    assert "example: opacus-pi score ledger.safetensors" in out
    for words in examples_in(more):
        build_parser().parse_args(words[1:])


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_help_of_each_command_is_one_screen_with_an_example(
    run, tmp_path, monkeypatch, name, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run(*name, "--help")
    code_of_all, everything, _ = run(*name, "--help-all")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forgotten").mkdir()  # a directory that a file is written to must exist
    assert (code, err, code_of_all) == (0, "", 0) and fits(out, width)
    assert examples_in(out)
    for words in (*examples_in(out), *examples_in(everything)):
        assert tuple(words[1:][: len(name)]) == name
        build_parser().parse_args(words[1:])
    flags = set(re.findall(r"--[a-z-]+", everything))
    assert flags <= set(re.findall(r"--[a-z-]+", out)) | {"--traceback"}


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_every_argument_is_explained(name):
    parser = build_parser()
    for word in name:
        parser = parser._subparsers._group_actions[0].choices[word]
    for action in parser._actions:
        assert action.help, (name, action.dest)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "opacus-pi: the following arguments are required: COMMAND"),
        (("forget",), "opacus-pi: argument COMMAND: invalid choice: 'forget'"),
        (("verfy", "x"), "'verify'); did you mean verify. See 'opacus-pi --help'"),
        (
            ("score", "x", "--tpo", "3"),
            "opacus-pi score: unrecognized arguments: --tpo 3; did you mean --top. See",
        ),
        (
            ("plan", "x", "--forget", "157", "191"),
            "opacus-pi plan: unrecognized arguments: 191. Separate ids by commas, as",
        ),
        (
            ("plan", "x", "--forgett", "3"),
            "is required; unrecognized: --forgett; did you mean --forget. See",
        ),
        (
            ("plan", "ledger.safetensors", "--forget=3-5"),
            "opacus-pi plan: --forget: 3-5 is not a list of positions: whole numbers",
        ),
        (
            ("unlearn", "--model", "m:n", "--weights", "w", "--data", "d:e", "--out")
            + ("new", "--pending"),
            "--pending: the requests are those of a deletion log. Add --log LOG",
        ),
        (
            ("plan", "x", "--forget", "3", "--method", "langvin"),
            "'ssd'); did you mean langevin. See",
        ),
        (("log",), "opacus-pi log: the following arguments are required: ACTION"),
        (("log", "lst", "x"), "did you mean list. See 'opacus-pi log --help'"),
        (
            ("log", "list", "x", "--pendng"),
            "opacus-pi log list: unrecognized arguments: --pendng; did you mean --pend",
        ),
        (("log", "list", "x"), "opacus-pi log list: LOG: no such file: x. Name what"),
        (("score",), "opacus-pi score: the following arguments are required: LEDGER"),
        (("score", "x", "--order", "high"), "argument --order: invalid float value"),
        (("score", "x", "--ord", "8"), "unrecognized arguments: --ord"),
        (("score", "x"), "opacus-pi score: LEDGER x: no such file"),
        (
            ("score", "."),
            "LEDGER .: path must name a regular file, not a directory",
        ),
        (("score", "cli_project.py"), "is truncated, or another kind of file"),
        (("score", "model.safetensors"), "must contain a ledger of gradient norms"),
        (
            ("score", "ledger.safetensors", "--order", "1"),
            "--order must be finite and above 1, got 1.0",
        ),
        (
            ("score", "ledger.safetensors", "--order", "nan"),
            "--order must be finite and above 1, got nan",
        ),
        (
            ("score", "ledger.safetensors", "--delta", "2"),
            "argument --delta: '2' is not a number between",
        ),
        (
            ("score", "ledger.safetensors", "--sigma", "0"),
            "--sigma must be above 0, got 0",
        ),
        (("score", "ledger.safetensors", "--tolerance", "2"), "--tolerance must"),
        (("score", "ledger.safetensors", "--sigma", "-1"), "--sigma must"),
        (("score", "ledger.safetensors", "--out", "no/x.json"), "--out: no/x.json"),
        (("score", "ledger.safetensors", "--out", "."), "--out: . cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, words, message):
    code, out, err = run(*words)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


FORGET = ("--forget", "3")
UNLEARN = ("unlearn", *MODEL, *DATA[:2], *FORGET, "--out", "never")
PLAN = ("plan", "ledger.safetensors", *FORGET)
LEDGER = ("--ledger", "ledger.safetensors")
REPORT = ("report", *LEDGER, "--out", "report.html")
STATES = (*LEDGER, "--checkpoints", "states")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*UNLEARN, *STATES, "--method", "langevin"), "--method: a rewind repeats"),
        ((*UNLEARN, *STATES, "--set", "a=1"), "--set: a rewind repeats"),
        ((*UNLEARN, *STATES, "--epochs", "25"), "--epochs: a rewind repeats"),
        ((*UNLEARN, *STATES, "--epochs=3"), "--epochs: a rewind repeats"),
        ((*UNLEARN, *STATES, "--batch-size", "9"), "--batch-size: a rewind"),
        ((*UNLEARN, *STATES, "--learning-rate", "1"), "--learning-rate: a rewind"),
        ((*UNLEARN, *STATES, "--momentum", "0"), "--momentum: a rewind"),
        ((*UNLEARN, "--checkpoints", "states"), "--checkpoints: a rewind needs the"),
        ((*UNLEARN, "--method", "ssd", "--epochs", "2"), "--epochs: ssd scales"),
        ((*UNLEARN, "--method=ssd", "--momentum", "0"), "--momentum: ssd scales"),
        ((*UNLEARN, "--set", "strength=1"), "--set: the default method, finetune, has"),
        ((*UNLEARN, "--policy"), "--policy: a deletion policy needs the saved states"),
        ((*UNLEARN, "--delta", "1e-6"), "--delta: without a ledger no ε"),
        ((*UNLEARN, "--without-ledger"), "without a log it suffices to leave out"),
        (
            (*UNLEARN, *LEDGER, "--without-ledger", "--log", "never.db"),
            "--without-ledger: a ledger is named",
        ),
        ((*UNLEARN, "--request-id", "a"), "--request-id: there is no log"),
        ((*PLAN, "--method", "finetune"), "--method: its guarantee depends on"),
        ((*PLAN, "--method", "l1", "--set", "strength=1"), "--method: its guarantee"),
        ((*PLAN, "--set", "strength=1"), "--set: the default method"),
        ((*PLAN, "--checkpoints", "states"), "--checkpoints: the guarantee of a"),
        ((*PLAN, "--delta", "1e-6"), "--delta: without a model there is no ε"),
        (
            (*PLAN, *MODEL[:2], "--sigma", "1", "--delta", "1e-6"),
            "--delta: with an assumed noise",
        ),
        (("evaluate", *MODEL, *DATA, *FORGET, "--match"), "--match: it matches"),
        ((*REPORT, "--evaluation", "x.json"), "--evaluation: an evaluation is shown"),
        ((*REPORT, "--sigma", "1", "--delta", "1e-6"), "--delta: with an assumed"),
        (
            ("score", "ledger.safetensors", "--sigma", "1", "--delta", "1e-6"),
            "--delta: with an assumed noise (--sigma) there is no ε",
        ),
        (("audit", *MODEL, *DATA[:2], "--examples", "33"), "not a number from 2 to 32"),
    ],
)
def test_options_without_an_effect_are_refused(run, words, message):
    code, out, err = run(*words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_warnings_are_lines_without_source_and_given_once(run, monkeypatch):
    def warn(options):
        for number in (1, 1, 2):
            warnings.warn(f"of\nthe user {number}", stacklevel=1)
        warnings.warn("of developers", FutureWarning, stacklevel=1)
        warnings.warn("Full backward hook is firing when", stacklevel=1)
        return 0

    monkeypatch.setattr("opacus_pi.cli.verify.run", warn)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = run("verify", "ledger.safetensors")
    assert (code, out) == (0, "") and warnings.showwarning is shown
    assert err.splitlines() == [
        "warning: of the user 1",
        "warning: of the user 2",
        "note: of developers",
    ]


def test_a_failure_while_running_is_exit_code_1(run):
    broken = ("--model", "cli_project:build_broken", "--weights", "model.safetensors")
    words = ("evaluate", *broken, *DATA, "--forget", "3")
    code, out, err = run(*words)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "RuntimeError: two lines of trouble" in err and "--traceback" in err
    with pytest.raises(RuntimeError, match="two"):
        main([*words, "--traceback"])


def test_as_a_process(project):
    command = [sys.executable, "-m", "opacus_pi", "verify"]
    good = subprocess.run(
        [*command, "ledger.safetensors"], cwd=project, capture_output=True, text=True
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == "verified: opacus_pi.GradNormLedger\n"


def test_the_parser_imports_no_large_library():
    heavy = {"torch", "opacus", "matplotlib", "numpy", "scipy", "jinja2"}
    code = f"""
import sys
from opacus_pi.cli import main
assert main(["--help"]) == main(["unlearn", "--help"]) == main(["--version"]) == 0
assert main(["log", "submit", "--help"]) == 0
assert main(["scor"]) == 2
sys.exit(str(found) if (found := {heavy} & set(sys.modules)) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version(run):
    assert run("--version") == (0, f"opacus-pi {opacus_pi.__version__}\n", "")


def test_the_entry_point_is_declared():
    assert '"opacus-pi=opacus_pi.cli:main"' in (ROOT / "setup.py").read_text()


ACTING = "\x1b[2J\x9b\u202e\u2028\udc80"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_names_from_elsewhere_do_not_act_on_the_terminal(run, tmp_path, words):
    """Names of files and texts in files may hold any character."""
    path = tmp_path / f"a{ACTING}.txt"
    path.write_text("x")
    code, out, err = run("verify", path, *words)
    assert code == 3 and "x1b" in out or "u001b" in out
    assert not set(ACTING) - set("[2J") & set(out + err)
    code, out, err = run("verify", tmp_path / f"none{ACTING}", *words)
    assert code == 2 and not set(ACTING) - set("[2J") & set(out + err)


def test_a_ledger_that_names_its_data_set_so(run, tmp_path, ledger):
    ledger = dataclasses.replace(ledger, data_set=f"mine{ACTING[:-1]}")
    ledger.save(tmp_path / "ledger")
    code, out, err = run("score", tmp_path / "ledger", "--json")
    assert (code, err) == (0, "") and not set(ACTING) - set("[2J") & set(out)
    assert json.loads(out)["training"]["data_set"] == ledger.data_set


@pytest.mark.parametrize("option", ["--out", "--csv"])
def test_a_file_that_is_read_is_not_written_over(run, tmp_path, option):
    ledger = tmp_path / "ledger"
    ledger.write_bytes(b"the only copy")
    (tmp_path / "link").symlink_to(ledger)
    for written in (ledger, tmp_path / "link"):
        code, _, err = run("score", str(ledger), option, str(written))
        assert code == 2 and "named twice" in err
        assert ledger.read_bytes() == b"the only copy"
