"""Opacus's own test suite passes with our engine in place of Opacus's."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

REPOSITORY = Path(__file__).parents[2]
OPACUS = Path(importlib.util.find_spec("opacus").origin).parent
FILES = [  # whatever reaches an engine, its loaders, optimizers or accountants
    "privacy_engine_test.py",
    "privacy_engine_validation_test.py",
    "batch_memory_manager_test.py",
    "gradient_accumulation_test.py",
    "dpdataloader_test.py",
    "poisson_test.py",
    "randomness_test.py",
    "accounting_noise_multiplier_test.py",
    "schedulers/noise_scheduler_test.py",
    "schedulers/grad_clip_scheduler_test.py",
]
# Slow, and of a kind that the tests which stay have too.
WITHOUT = (
    "not ExpandedWeights and not Functorch and not Text and not Frozen "
    "and not ConvNetHooks and not TiedWeightsHooks "
    "and not test_validator_weight_update_check and not test_model_validator_after_fix "
    "and not (TiedWeights and epsilon) and not (CustomLayer and epsilon) "
    "and not (ConvNetTest and checkpoints) and not (ConvNetTest and noise_level)"
)


def run_shipped(tests, engine, folder, *options):
    """Run tests of Opacus in a process of its own; return what the plugin wrote."""
    report = folder / "report.json"
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DROPIN_ENGINE": engine,
        "DROPIN_REPORT": str(report),
        "OMP_NUM_THREADS": "1",
    }
    plugins = ("-p", "tests.dropin.binding", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *plugins]
    done = subprocess.run(
        [*command, "--rootdir", str(OPACUS.parent), *options, *map(str, tests)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The report of Opacus's tests with our engine."""
    files = [OPACUS / "tests" / name for name in FILES]
    present = [file for file in files if file.exists()]
    if not present:
        pytest.skip("this build of Opacus ships no tests")
    folder = tmp_path_factory.mktemp("ours")
    engine = "opacus_pi:PrivacyEngine"
    return run_shipped(present, engine, folder, "-k", WITHOUT)


def test_the_files_really_saw_our_engine(shipped):
    assert not shipped["errors"]
    assert len(shipped["seen"]) >= 7
    assert set(shipped["seen"].values()) == {
        "opacus_pi.integration.engine.PrivacyEngine"
    }


def test_what_passes_with_opacus_passes_with_us(shipped, tmp_path):
    outcomes = shipped["outcomes"]
    assert sum(outcome == "passed" for outcome in outcomes.values()) >= 100
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    if failed:  # is it Opacus's own failure, with this torch?
        tests = [OPACUS.parent / test for test in failed]
        other = run_shipped(tests, "", tmp_path)["outcomes"]
        regressions = [test for test in failed if other.get(test) == "passed"]
        assert not regressions
