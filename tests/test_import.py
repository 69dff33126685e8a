"""Importing the package registers two accountants, and does nothing else."""

import json
import subprocess
import sys

import pytest

CHANGES = """
import json, random, sys, time, warnings
import numpy, opacus, torch
from opacus.accountants import registry

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
import opacus_pi
seconds, after = time.process_time() - start, state()
print(json.dumps({
    "seconds": seconds,
    "accountants": sorted(set(registry._ACCOUNTANTS) - known),
    "changed": [name for name in before if before[name] != after[name]],
    "modules": sorted({m.split(".")[0] for m in set(sys.modules) - modules}),
}))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHANGES],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return json.loads(done.stdout)


def test_two_accountants_are_registered(found):
    assert found["accountants"] == ["group", "per_instance"]


def test_nothing_is_changed(found):
    assert found["changed"] == []


@pytest.mark.parametrize(
    "package", ["matplotlib", "sklearn", "optuna", "lightning", "transformers"]
)
def test_what_only_some_need_is_not_imported(found, package):
    assert package not in found["modules"]


def test_it_takes_less_than_a_second_over_opacus(found):
    assert found["seconds"] < 1.0  # of processor time: others may be busy
