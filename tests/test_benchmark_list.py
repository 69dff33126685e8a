"""The list of benchmarks names every command and every result, and nothing else."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIST = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
LINKS = {
    (BENCHMARKS / target).resolve() for target in re.findall(r"\]\(([^)]+)\)", LIST)
}
LISTED = set(re.findall(r"python -m (benchmarks[\w.]*)", LIST))


def commands():
    """Modules that can be run, by the name that runs them."""
    for path in BENCHMARKS.rglob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            parts = path.relative_to(BENCHMARKS.parent).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__main__")


def test_every_command_is_listed_and_exists():
    assert set(commands()) == LISTED
    assert all(find_spec(name) for name in LISTED)


def test_links_lead_somewhere():
    assert all(path.exists() for path in LINKS), [p for p in LINKS if not p.exists()]


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").iterdir()), ids=lambda p: p.name
)
def test_every_result_is_listed(path):
    inside = set(path.iterdir()) if path.is_dir() else set()
    assert path in LINKS or inside and inside <= LINKS
