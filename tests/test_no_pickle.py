"""No file of ours runs code when it is opened: a check of every file's syntax tree."""

import ast
import io
from pathlib import Path

import pytest
import torch

from tests.fuzz import originals

PACKAGE = Path(__file__).parents[1] / "opacus_pi"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("torch.load", "torch.save", "numpy.load", "np.load", "eval", "exec"),
    *("yaml.load", "torch.jit.load", "torch.package.PackageImporter"),
}


def pickles(source):
    """Imports and calls that could unpickle, as (what, line)."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in MODULES or name in CALLS:
                yield name, node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            yield ast.unparse(node.func), node.lineno
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle", node.value.lineno


# the command line reads what the user names: arrays and weights only
ALLOWED = {
    "torch.load": "weights_only=True",
    "torch.save": "weights_only=True",  # a copy of what that accepted
    "np.load": "allow_pickle=False",
    "allow_pickle": "allow_pickle=False",
    "pickle.UnpicklingError": "UnpicklingError",  # torch's refusal
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_unpickled(path):
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for what, line in pickles(source):
        near = "".join(lines[line - 2 : line + 4])
        assert what in ALLOWED and ALLOWED[what] in near, f"{path.name}:{line}: {what}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from torch import load",
        "eval('1')",
    ],
)
def test_the_check_can_fail(source):
    assert list(pickles(source))


@pytest.mark.parametrize(
    "state", [originals.checkpoint_key(), originals.filter_key()], ids=["run", "filter"]
)
def test_our_keys_in_a_checkpoint_hold_tensors_numbers_and_text(state):
    assert {type(value) for value in state.values()} <= {torch.Tensor, int, float, str}
    content = originals.as_file(state)
    again = torch.load(io.BytesIO(content), weights_only=True)
    assert again.keys() == state.keys()
