"""Imports point one way: a syntax-tree check of every file of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opacus_pi"

LAYER = {
    "_types": 0,
    "_validate": 0,
    "_errors": 0,
    "accounting": 0,
    "atomic_file": 0,
    "proxies": 0,
    "forget_sets": 0,
    "correlations": 0,
    "processes": 1,
    "sealed_state": 1,
    "weights_file": 1,
    "gradients": 1,
    "group_record": 2,
    "recorder": 2,
    "unlearning": 2,
    "evaluation": 2,
    "plotting": 2,
    "attribution": 3,
    "compatible": 3,
    "engine": 3,
    "lightning": 3,
    "monitor": 3,
    "fast": 3,
    "grad_sample": 3,
    "group_accountant": 3,
    "accountants": 3,
    "privacy_engine": 3,
    "report": 2,
    "cli": 4,
    "__main__": 4,
    "": 4,  # opacus_pi/__init__.py, which only gathers the public names
}
# the lowest layer in which a third-party package may be imported
FLOOR = {
    "torch": 1,
    "torchvision": 4,
    "tqdm": 1,
    "sklearn": 2,
    "optuna": 2,
    "matplotlib": 2,
    "opacus": 3,
    "lightning": 3,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The top-level module of the package that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts[0] == "__init__" else parts[0]


def imported(path: Path):
    """Every module a file imports, as (dotted name, line)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno
            if node.module == "opacus_pi":
                for alias in node.names:
                    yield f"opacus_pi.{alias.name}", node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    layer = LAYER[room(path)]
    for name, line in imported(path):
        root, *rest = name.split(".")
        where = f"{path.name}:{line} imports {name}"
        if root == "opacus_pi" and rest:
            assert LAYER[rest[0]] <= layer, where
        assert layer >= FLOOR.get(root, 0), where
        assert root not in {"benchmarks", "tests"}, where


def test_the_check_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import opacus.optimizers\nfrom opacus_pi import accounting\n")
    assert [n for n, _ in imported(bad)] == [
        "opacus.optimizers",
        "opacus_pi",
        "opacus_pi.accounting",
    ]


def test_evaluation_and_unlearning_do_not_know_each_other():
    for path in (PACKAGE / "evaluation").glob("*.py"):
        assert not [n for n, _ in imported(path) if "opacus_pi.unlearning" in n]
    for path in (PACKAGE / "unlearning").glob("*.py"):
        metrics = [n for n, _ in imported(path) if "opacus_pi.evaluation" in n]
        assert set(metrics) <= {"opacus_pi.evaluation.trace"}, path
