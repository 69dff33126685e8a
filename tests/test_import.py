"""Importing the package is fast and changes nothing; its names come when used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import opacus_pi

CHANGES = """
import json, random, sys, time, warnings

begin = time.process_time()
import numpy, opacus, torch
from opacus.accountants import registry

of_opacus = time.process_time() - begin

def state():
    words = numpy.random.get_state()[1]
    return {
        "python": hash(random.getstate()),
        "numpy": hash(words.tobytes()),
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": [str(f) for f in warnings.filters],
        "errors": numpy.geterr(),
        "printing": str(numpy.get_printoptions()),
        "engine": [id(v) for v in vars(opacus.PrivacyEngine).values()],
        "loader": [id(v) for v in vars(torch.utils.data.DataLoader).values()],
        "module": [id(v) for v in vars(torch.nn.Module).values()],
        "optimizer": [id(v) for v in vars(torch.optim.Optimizer).values()],
    }

before, modules = state(), set(sys.modules)
known, start = set(registry._ACCOUNTANTS), time.process_time()
import opacus_pi.integration
for name in opacus_pi.__all__:
    getattr(opacus_pi, name)
seconds, after = time.process_time() - start, state()
print(json.dumps({
    "share": seconds / of_opacus,
    "accountants": sorted(set(registry._ACCOUNTANTS) - known),
    "changed": [name for name in before if before[name] != after[name]],
    "modules": sorted({m.split(".")[0] for m in set(sys.modules) - modules}),
}))
"""


def run(code):
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return run(CHANGES)


def test_two_accountants_are_registered(found):
    assert found["accountants"] == ["group", "per_instance"]


def test_nothing_is_changed(found):
    assert found["changed"] == []


@pytest.mark.parametrize(
    "package", ["matplotlib", "sklearn", "optuna", "lightning", "transformers"]
)
def test_what_only_some_need_is_not_imported(found, package):
    assert package not in found["modules"]


def test_all_names_take_less_than_a_third_of_the_time_of_opacus(found):
    assert found["share"] < 1 / 3  # of processor time: the machine may be busy or slow


LOADED = """
import json, sys
import opacus_pi
{use}
loaded = {{name.split(".")[0] for name in sys.modules}}
heavy = sorted(loaded & {{"numpy", "scipy", "torch", "opacus", "matplotlib"}})
print(json.dumps(heavy))
"""


def test_a_plain_import_loads_nothing():
    heavy = run(LOADED.format(use=""))
    assert heavy == []


@pytest.mark.parametrize("name", ["GradNormLedger", "GramLedger", "NoisySGD"])
def test_ledgers_need_no_torch(name):
    heavy = run(LOADED.format(use=f"opacus_pi.{name}"))
    assert "numpy" in heavy and not {"torch", "opacus", "matplotlib"} & set(heavy)


@pytest.mark.parametrize(
    "use",
    ["import opacus_pi.integration", "opacus_pi.PrivacyEngine"],
)
def test_accountants_register_on_first_use(use):
    code = (
        "import json, opacus_pi\n"
        f"{use}\n"
        "import opacus\n"
        "names = 'per_instance', 'group'\n"
        "engines = [opacus.PrivacyEngine(accountant=name) for name in names]\n"
        "print(json.dumps([type(e.accountant).__name__ for e in engines]))"
    )
    assert run(code) == ["PerInstanceAccountant", "GroupAccountant"]


def typed_imports():
    """Home of each name that the package imports for type checkers."""
    tree = ast.parse(Path(opacus_pi.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module.removeprefix("opacus_pi.")
        for node in block.body
        for alias in node.names
    }


def test_type_checkers_and_users_find_the_same_names():
    assert typed_imports() == opacus_pi._HOMES
    assert sorted(opacus_pi._HOMES) == opacus_pi.__all__
    assert set(opacus_pi.__all__) < set(dir(opacus_pi))


def test_rooms_are_reached_after_a_plain_import():
    code = (
        "import json, opacus_pi\n"
        "rooms = sorted(opacus_pi._ROOMS)\n"
        "print(json.dumps([getattr(opacus_pi, r).__name__ for r in rooms] == "
        "[f'opacus_pi.{r}' for r in rooms]))"
    )
    assert run(code) is True


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Engine'"):
        _ = opacus_pi.Engine
