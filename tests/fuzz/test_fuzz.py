"""Mutated files: a clear error or sound data, never anything else.

``FUZZ_COUNT`` files, ``FUZZ_SEED``; ``python -m tests.fuzz 100000`` for many.
"""

import os

import pytest

from tests.fuzz.campaign import campaign
from tests.fuzz.targets import targets

COUNT = int(os.environ.get("FUZZ_COUNT", "2200"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def test_no_mutated_file_is_trusted():
    outcomes, failures = campaign(COUNT, SEED)
    assert not failures, failures[:5]
    assert sum(outcomes.values()) == COUNT
    if COUNT >= 2000:  # the mutations get behind the checksum, in every format
        for name in targets():
            kinds = {kind for n, seal, kind in outcomes if n == name and seal}
            assert kinds >= {"refused", "valid"}, (name, kinds)


@pytest.mark.parametrize("name", targets())
def test_the_originals_are_read_and_sound(tmp_path, name):
    target = targets()[name]
    path = tmp_path / target.name
    path.write_bytes(target.original)
    answer = target.read(path)
    assert target.equal(answer)
    target.check(answer)


def test_the_campaign_can_fail(monkeypatch):
    """A reader that takes everything, and one that crashes, are found."""

    def found(read, **changes):
        target = targets()["weights"]
        changed = type(target)(**{**vars(target), "read": read, **changes})
        monkeypatch.setattr("tests.fuzz.campaign.targets", lambda: {"it": changed})
        return {outcome.split(":")[0] for *_, outcome in campaign(8)[1]}

    assert found(lambda path: {"0.weight": None}, equal=bool) == set()
    assert found(lambda path: {}, equal=lambda answer: False) == {"silent", "invalid"}
    assert found(lambda path: 1 / 0) == {"crash"}
    assert found(lambda path: [][0]) == {"crash"}
    assert found(lambda path: int("x")) == {"unclear"}
    assert found(lambda path: bytearray(1 << 40)) == {"crash"}


def test_a_reader_that_hangs_is_found(monkeypatch):
    import time

    monkeypatch.setattr("tests.fuzz.campaign.SECONDS", 0.05)
    target = targets()["weights"]
    slow = type(target)(**{**vars(target), "read": lambda path: time.sleep(60)})
    monkeypatch.setattr("tests.fuzz.campaign.targets", lambda: {"slow": slow})
    assert [outcome for *_, outcome in campaign(1)[1]] == ["hang"]
