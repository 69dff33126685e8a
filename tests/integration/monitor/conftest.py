"""These tests monitor runs without a ledger on purpose: two warnings are expected."""

from pathlib import Path

import pytest

EXPECTED = ("This run has no ledger", ".*samples are unattributed")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for message in EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
