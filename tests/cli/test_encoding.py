"""Outputs whose encoding lacks some characters: words or escapes, and never a crash."""

import io
import json
import os
import subprocess
import sys

import pytest

from opacus_pi.cli import main
from opacus_pi.cli.encoding import in_ascii, printing_all
from tests.cli.test_program import NAMES


@pytest.fixture
def ascii_run(monkeypatch):
    """Run a command with ASCII streams; return its code, output and errors."""

    def run(*words, encoding="ascii"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        code = main([str(word) for word in words])
        monkeypatch.undo()
        for stream in streams:
            assert stream.errors == "strict"  # as it was
            stream.flush()
        return code, *(s.buffer.getvalue().decode(encoding) for s in streams)

    return run


@pytest.mark.parametrize("name", [(), *NAMES], ids=" ".join)
def test_all_help_is_printed(ascii_run, name):
    code, out, err = ascii_run(*name, "--help")
    assert (code, err) == (0, "") and out.isascii()
    assert "\\u" not in out  # everything has a name


def test_answers_and_errors_are_printed(ascii_run, project, tmp_path):
    code, out, err = ascii_run("score", project / "ledger.safetensors")
    assert (code, err) == (0, "") and "epsilon" in out
    words = ("score", project / "ledger.safetensors", "--json")
    assert json.loads(ascii_run(*words)[1])
    code, out, err = ascii_run("score", "α–ä.safetensors")
    assert code == 2 and "alpha-\\u00e4.safetensors: no such file" in err
    path = tmp_path / "ε ≤ ü🙂.txt"
    path.write_text("x")
    for encoding in ("ascii", "latin-1", "utf-8"):
        code, out, _ = ascii_run("verify", path, "--json", encoding=encoding)
        assert code == 3 and json.loads(out)["file"] == str(path)


def test_a_process_writes_to_a_file(tmp_path):
    (tmp_path / "ε.txt").write_text("x")
    words = [sys.executable, "-m", "opacus_pi", "verify", "ε.txt"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, sys.path))
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(words, cwd=tmp_path, stdout=out, env=environment)
    assert done.returncode == 3
    assert (tmp_path / "out").read_bytes().startswith(b"NOT CHECKED: epsilon.txt is")


def test_what_stands_for_characters():
    assert in_ascii("Rényi, λ ‖w‖² − 1 … ä") == "Renyi, lambda ||w||^2 - 1 ... \\u00e4"


def test_streams_that_cannot_be_changed_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with printing_all():
        print("ε")
    assert sys.stdout.getvalue() == "ε\n"
