"""Type checkers see the arguments and results of ``make_private``."""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import opacus
import pytest

from opacus_pi.integration import engine

ROOT = Path(engine.__file__).parents[2]
START = """
import torch
from torch.utils.data import DataLoader
from opacus_pi import PrivacyEngine

def train(net: torch.nn.Module, sgd: torch.optim.SGD, data: DataLoader[int]) -> None:
    engine = PrivacyEngine(accountant="rdp")
"""
GIVEN = "module=net, optimizer=sgd, data_loader=data, max_grad_norm=1.0"
MAKE = f"engine.make_private({GIVEN}, noise_multiplier=1.0"
LOADER = "torch.utils.data.dataloader.DataLoader[Any]"
REVEALED = {  # an expression of a user's program: what a type checker must find
    f"{MAKE})": f"tuple[Any, Any, {LOADER}]",
    f'{MAKE}, grad_sample_mode="fast")': f"tuple[Any, Any, {LOADER}]",
    f'{MAKE}, grad_sample_mode="ghost")': f"tuple[Any, Any, Any, {LOADER}]",
    f"engine.make_private_with_epsilon({GIVEN}, target_epsilon=1.0, "
    "target_delta=1e-5, epochs=1)": f"tuple[Any, Any, {LOADER}]",
    "engine.get_epsilon(1e-5)": "float",
    "engine.ledger": "opacus_pi.ledger.grad_norm_ledger.GradNormLedger",
}


def mypy(folder, *lines):
    """What mypy says about a user's program, strictly and without a configuration."""
    pytest.importorskip("mypy")
    program = folder / "program.py"
    program.write_text(START + "".join(f"    {line}\n" for line in lines))
    options = ("--strict", "--config-file=", "--follow-imports=silent")
    cache = f"--cache-dir={folder / 'cache'}"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, cache, program.name],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_results_are_found_and_missing_arguments_are_errors(tmp_path):
    unpacked = f"model, optimizer, loader = {MAKE})"
    wrong = "engine.make_private(module=net)"
    said = mypy(tmp_path, *(f"reveal_type({e})" for e in REVEALED), unpacked, wrong)
    revealed = [line.split('"')[1] for line in said.splitlines() if "Revealed" in line]
    assert revealed == list(REVEALED.values())
    errors = [line for line in said.splitlines() if ": error:" in line]
    last = START.count("\n") + len(REVEALED) + 2
    assert len(errors) == 1 and errors[0].startswith(f"program.py:{last}:"), said
    assert "No overload variant" in errors[0]


@pytest.mark.parametrize("name", ["make_private", "make_private_with_epsilon"])
def test_the_declared_arguments_are_those_of_opacus(name):
    place = importlib.util.find_spec("opacus_pi.integration.engine").origin
    tree = ast.parse(Path(place).read_text(encoding="utf-8"))
    declared = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == name
        if any(getattr(d, "id", "") == "overload" for d in node.decorator_list)
    ]
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, name)).parameters
    assert len(declared) == 2
    for node in declared:
        ours = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        assert [*ours, node.args.kwarg.arg] == list(theirs)
