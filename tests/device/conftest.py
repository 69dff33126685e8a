"""Registers the simulated device if it was built, and skips these tests if not."""

import os
from pathlib import Path

import pytest

from tests.device import simulated

_LIBRARY = os.environ.get("SIMULATED_DEVICE", "")
_WHY = (
    "These tests need the simulated device in a process of their own. "
    "`.ci/nightly device` builds it and runs them."
)


def pytest_configure(config):
    if _LIBRARY:
        simulated.register(Path(_LIBRARY))


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if not _LIBRARY and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=_WHY))
