"""The exit codes mean the same for every command, and the page says what."""

import re
from pathlib import Path

import pytest

from opacus_pi.cli import errors
from opacus_pi.cli.commands import COMMANDS
from opacus_pi.cli.parser import MORE
from tests.cli.conftest import DATA, MODEL

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
CODES = {0: "DONE", 1: "FAILED", 2: "BAD_INPUT", 3: "NOTHING_TO_CHECK"}
GOOD = {
    "audit": ("--model", "cli_project:build", *DATA[:2]),
    "score": ("ledger.safetensors",),
    "plan": ("ledger.safetensors", "--forget", "3"),
    "unlearn": (*MODEL, *DATA, "--forget", "3", "--epochs", "1", "--out", "DIR/run"),
    "evaluate": (*MODEL, *DATA, "--forget", "3"),
    "report": ("--ledger", "ledger.safetensors", "--out", "DIR/report.html"),
    "heads": ("--model", "cli_project:build", *DATA[:2], "--classes", "10"),
    "log": ("submit", "DIR/log.db", *DATA[:2], "--forget", "3"),
    "verify": ("ledger.safetensors",),
}
PROGRAM = {name: f"opacus-pi {name}" for name in COMMANDS}
PROGRAM["log"] += " submit"


@pytest.fixture
def go(run, tmp_path):
    def run_it(name, *more):
        words = [str(word).replace("DIR", str(tmp_path)) for word in GOOD[name]]
        return run(name, *words, *more)

    return run_it


def raising(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_0_is_done(go, name):
    code, out, err = go(name)
    assert code == 0 and out and err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_1_is_a_failure_while_running(go, monkeypatch, name):
    monkeypatch.setattr(
        f"opacus_pi.cli.{name}.run", raising(RuntimeError("out of luck"))
    )
    code, out, err = go(name)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "out of luck" in err


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "error", [errors.BadInput("x"), ValueError("x"), PermissionError("x")]
)
def test_2_is_an_error_that_the_user_can_correct(go, monkeypatch, name, error):
    monkeypatch.setattr(f"opacus_pi.cli.{name}.run", raising(error))
    assert go(name) == (2, "", f"{PROGRAM[name]}: x\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_2_is_a_bad_argument(go, name):
    code, out, err = go(name, "--no-such-flag")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"See '{PROGRAM[name]} --help'" in err or "See 'opacus-pi --help'" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_130_is_interrupted(go, monkeypatch, name):
    monkeypatch.setattr(f"opacus_pi.cli.{name}.run", raising(KeyboardInterrupt()))
    assert go(name) == (130, "", f"{PROGRAM[name]}: interrupted\n")


def test_a_name_that_cannot_be_written_is_found_before_anything_is_run(go, monkeypatch):
    for name in ("score", "plan", "evaluate"):
        monkeypatch.setattr(
            f"opacus_pi.cli.{name}.run", raising(RuntimeError("was run"))
        )
        code, _, err = go(name, "--out", "no/such/file.json")
        assert code == 2 and "--out: no/such/file.json cannot be written" in err


def test_the_codes_are_written_down():
    constants = {number: getattr(errors, name) for number, name in CODES.items()}
    assert constants == {number: number for number in CODES}
    codes = {*map(str, CODES), str(errors.INTERRUPTED)}
    in_help = re.findall(r"^  (\d+) ", MORE, re.MULTILINE)
    page = PAGE.read_text(encoding="utf-8").split("| exit code |")[1].split("\n\n")[0]
    on_page = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert set(in_help) == set(on_page) == codes
