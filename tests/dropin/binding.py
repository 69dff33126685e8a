"""A pytest plugin: Opacus's own tests, with another class for ``PrivacyEngine``.

Loaded by ``-p tests.dropin.binding`` in a process of its own. ``DROPIN_ENGINE`` names
the class (``module:Class``; empty: Opacus's), ``DROPIN_REPORT`` the JSON file to write.
"""

import importlib
import json
import os

import hypothesis
import opacus

_report = {"outcomes": {}, "seen": {}, "errors": []}


def _name(engine):
    return f"{engine.__module__}.{engine.__qualname__}"


def pytest_configure(config):
    """Before anything is collected, so that ``from opacus import`` gets ours."""
    hypothesis.settings.register_profile(
        "few", max_examples=2, derandomize=True, database=None, deadline=None
    )
    hypothesis.settings.load_profile("few")
    named = os.environ.get("DROPIN_ENGINE")
    if named:
        module, _, name = named.partition(":")
        engine = getattr(importlib.import_module(module), name)
        opacus.PrivacyEngine = opacus.privacy_engine.PrivacyEngine = engine


def pytest_collection_modifyitems(items):
    """Which class each test file really uses."""
    for item in items:
        engine = getattr(item.module, "PrivacyEngine", None)
        if engine is not None:
            _report["seen"][item.path.name] = _name(engine)


def pytest_collectreport(report):
    """A file that cannot be imported."""
    if report.failed:
        _report["errors"].append(str(report.longrepr)[-500:])


def pytest_runtest_logreport(report):
    """The worst phase (and subtest) of a test is its outcome."""
    before = _report["outcomes"].get(report.nodeid, "passed")
    outcome = report.outcome if before != "failed" else before
    if report.when == "call" or outcome != "passed":
        _report["outcomes"][report.nodeid] = outcome


def pytest_sessionfinish():
    """Leave the report."""
    with open(os.environ["DROPIN_REPORT"], "w", encoding="utf-8") as file:
        json.dump(_report, file)
