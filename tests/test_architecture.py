"""The page on the structure names every room at its layer, and files that exist."""

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


WALK = re.compile(
    r"^\d\. `([\w/]+\.py)`(?: and `([\w/]+\.py)`)?(?:, `([\w.]+)`)?", re.M
)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", TEXT))), ids=str
)
def test_files_that_are_named_exist(path):
    beside = [PACKAGE / found[0] for found in WALK.findall(TEXT)]
    homes = [PACKAGE, PACKAGE.parent, *(place.parent for place in beside)]
    assert any((home / path).exists() for home in homes), path


def test_walks_have_fewer_than_ten_stops_at_places_that_exist():
    walks = re.split(
        r"^### ", TEXT.split("\n## Three walks")[1].split("\n## ")[0], flags=re.M
    )
    stops = [WALK.findall(walk) for walk in walks[1:]]
    assert len(stops) == 3 and all(3 < len(walk) < 10 for walk in stops)
    for path, _, name in (stop for walk in stops for stop in walk):
        text = (PACKAGE / path).read_text(encoding="utf-8")
        last = name.rpartition(".")[2]
        assert re.search(rf"(def|class) {last}\b", text) or not name, (path, name)
