"""The page on the package's structure names every room, at its layer, and no other."""

import re
from pathlib import Path

import pytest

from tests.test_layers import LAYER, PACKAGE

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")


def rooms():
    """Top-level modules and packages, and every package inside them."""
    found = {path.stem for path in PACKAGE.glob("*.py")}
    for path in PACKAGE.rglob("__init__.py"):
        found.add(".".join(path.parent.relative_to(PACKAGE).parts))
    return found - {"", "__init__"}


def layers_of(text):
    """The rooms in the tables under each layer's heading."""
    parts = re.split(r"^### Layer (\d)", text.split("\n## What holds")[0], flags=re.M)
    return {
        int(number): re.findall(r"^\| `([\w.]+)` \|", part, re.MULTILINE)
        for number, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_room_has_one_row():
    named = [room for found in layers_of(TEXT).values() for room in found]
    assert sorted(named) == sorted(rooms())


def test_rooms_stand_at_their_layers():
    for layer, named in layers_of(TEXT).items():
        for room in named:
            assert LAYER[room.split(".")[0]] == layer, room


def test_the_check_can_fail():
    text = "### Layer 0: a\n| `one` | x |\n### Layer 3\n| `two.three` | `four` |\n"
    assert layers_of(text) == {0: ["one"], 3: ["two.three"]}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", TEXT))), ids=str
)
def test_files_that_are_named_exist(path):
    homes = [PACKAGE, PACKAGE.parent, PACKAGE / "gradients"]
    assert any((home / path).exists() for home in homes), path
