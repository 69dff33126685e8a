"""Private names of other packages are used where they are listed, and nowhere else.

``_torch_compat.py`` and ``integration/opacus_compat.py`` list every private name of
torch and of Opacus that the package uses, with the versions it was seen in;
``integration/lightning.py``, the only file that knows Lightning, lists Lightning's. A
private name used anywhere else is found here. The search reads syntax trees:

* an import of a private module or a private name from outside the package;
* a private attribute of anything but ``self`` and ``cls``, unless the same file defines
  it or it starts with ``_pi_`` (attributes that the package itself adds to objects);
* ``getattr``, ``hasattr``, ``setattr`` and ``delattr`` with such a name as a string.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opacus_pi"
LISTED = {"_torch_compat.py", "integration/opacus_compat.py"}
LIGHTNING = "integration/lightning.py"
LIGHTNINGS_OWN = {"_data_source"}
FILES = sorted(PACKAGE.rglob("*.py"))
BY_STRING = {"getattr", "hasattr", "setattr", "delattr"}


PUBLIC = {"_asdict", "_fields", "_make", "_replace"}  # documented, of named tuples


def is_private(name):
    ours = name.startswith(("__", "_pi_"))
    return name.startswith("_") and not ours and name not in PUBLIC


def defined(tree):
    """Private names that a file defines: functions, classes, attributes, variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def is_own(node):
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_private_names(text):
    """Private names of others that a file uses, as (name, line)."""
    tree = ast.parse(text)
    own = set(defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] == "opacus_pi":
                continue
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from ((part, node.lineno) for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from ((p, node.lineno) for p in parts if is_private(p))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if not is_own(node.value) and node.attr not in own:
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in BY_STRING and len(node.args) > 1:
                name = getattr(node.args[1], "value", "")
                if isinstance(name, str) and is_private(name) and name not in own:
                    yield name, node.lineno


def place(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=place)
def test_private_names_of_others_are_used_where_they_are_listed(path):
    if place(path) not in LISTED:
        allowed = LIGHTNINGS_OWN if place(path) == LIGHTNING else set()
        found = foreign_private_names(path.read_text(encoding="utf-8"))
        assert [(name, line) for name, line in found if name not in allowed] == []


@pytest.mark.parametrize("name", sorted([*LISTED, LIGHTNING]))
def test_the_lists_say_which_versions_they_were_seen_in(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert list(foreign_private_names(text))
    assert re.search(r"\d+\.\d+", ast.get_docstring(ast.parse(text)))


def test_the_check_can_fail():
    found = foreign_private_names(
        "from torch.utils import _pytree\n"
        "from torch._C import x\n"
        "import torch._dynamo\n"
        "p._version\n"
        "getattr(p, '_norm_sample', None)\n"
        "super()._prepare_model()\n"
        "self._mine = p._pi_run\n"
        "other._mine\n"
    )
    assert sorted(found, key=lambda pair: pair[1]) == [
        ("_pytree", 1),
        ("_C", 2),
        ("_dynamo", 3),
        ("_version", 4),
        ("_norm_sample", 5),
    ]
