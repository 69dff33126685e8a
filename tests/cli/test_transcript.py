"""The session in the documentation is what happens, but for the numbers."""

import re
import runpy
import shlex
import shutil
import sys
import warnings
from dataclasses import MISSING, fields, replace
from pathlib import Path

import safetensors.torch
import torch

from opacus_pi import GradNormLedger, unlearning
from opacus_pi.cli import main
from opacus_pi.cli.commands import COMMANDS
from opacus_pi.cli.methods import METHODS
from opacus_pi.ledger.grad_norm_ledger import filled_by_rank
from opacus_pi.report.run import MEANING
from opacus_pi.unlearning import DeletionLog

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
_NUMBER = re.compile(r"[0-9a-f]{16,}|-?\d[\d.]*(?:e[+-]\d+)?|∞")


def blocks(language):
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def without_numbers(text):
    """Each line's words, numbers and hashes as #, spaces as one."""
    lines = (_NUMBER.sub("#", line).split() for line in text.strip().splitlines())
    return [" ".join(words) for words in lines]


def session():
    """Each command of the page with what it prints there."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, printed = re.match(
                r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", part, re.DOTALL
            ).groups()
            yield shlex.split(command.replace("\\\n", " ")), printed


def test_the_session_of_the_page(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    (tmp_path / "my_project.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path("my_project.py", run_name="__main__")
    commands = list(session())
    assert {words[1] for words, _ in commands} == set(COMMANDS)
    for (program, *words), printed in commands:
        assert program == "opacus-pi"
        code = {"NOT VERIFIED": 1, "NOT CHECKED": 3}.get(printed.split(":")[0], 0)
        assert main(words) == code, words
        out, err = capsys.readouterr()
        assert err == ""
        assert without_numbers(out) == without_numbers(printed), words
    assert (tmp_path / "report.html").exists()
    capsys.readouterr()
    run_examples_of_help(capsys)


def run_examples_of_help(capsys):
    """Run every example of every help in the project of the page."""
    weights = safetensors.torch.load_file("model.safetensors")
    whole = filled_by_rank(GradNormLedger.load("ledger.safetensors"))
    part = whole.subset([3, 5, 17, *range(20, 30), 200, 232])  # to be quick
    for name in ("ledger", "run1", "plain_sgd"):
        part.save(f"{name}.safetensors")
    replace(part, grad_norms=part.grad_norms / 2).save("run2.safetensors")
    torch.save(weights, "model.pt")
    for number in (1, 2):
        moved = {name: value + number * 0.01 for name, value in weights.items()}
        torch.save(moved, f"retrained{number}.pt")
    names = {"ids": "3 17", "new": "5", "easy": "200", "hard": "232"}
    for name, ids in names.items():
        Path(f"{name}.txt").write_text(ids)
    head = DeletionLog("deletions.db").head
    for name, command in COMMANDS.items():
        for one in (command, *command.actions.values()):
            for line in one.examples.replace("\\\n", " ").strip().split("\n"):
                words = shlex.split(re.sub(r"5f0c\.\.\.e1|[0-9a-f]{64}", head, line))
                if name == "unlearn":
                    shutil.rmtree("forgotten")
                assert main(words[1:]) == 0, (line, capsys.readouterr().err)
                capsys.readouterr()


def rows(title):
    """The cells of the table under a heading of the page, without code marks."""
    part = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return dict(line.replace("`", "").strip("| ").split(" | ") for line in lines)


def test_the_page_lists_the_methods_with_their_settings():
    found = {}
    for name, kind in METHODS.items():
        settings = [
            f"{f.name} (required)" if f.default is MISSING else f"{f.name}={f.default}"
            for f in fields(getattr(unlearning, kind))
        ]
        found[name] = ", ".join(settings) or "none"
    assert rows("Methods and settings") == found


def test_the_page_explains_the_metrics():
    assert rows("Metrics") == MEANING
