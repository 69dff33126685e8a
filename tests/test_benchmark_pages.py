"""Tables that are kept in the repository are made of the numbers stored beside them."""

import json
from pathlib import Path

from benchmarks import (
    certified_heads,
    certified_logistic,
    head_difficulty,
    noisy_fine_tuning,
)
from benchmarks.looseness import __main__ as looseness
from benchmarks.overhead import __main__ as overhead

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def stored(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_page_of_looseness():
    found = stored("looseness.json")
    page = looseness.markdown(found["table"], found["steps"], found["seed"])
    assert (ROOT / "docs" / "looseness.md").read_text(encoding="utf-8") == page


def test_table_of_overheads():
    table = (RESULTS / "overhead.md").read_text(encoding="utf-8")
    assert table == overhead.table(RESULTS) + "\n"


def test_table_of_certified_steps():
    table = (RESULTS / "certified_logistic.md").read_text(encoding="utf-8")
    rows = stored("certified_logistic.json")["rows"]
    assert table == certified_logistic.markdown(rows, num_seeds=5)


def test_page_of_certified_heads():
    page = (ROOT / "docs" / "certified-heads.md").read_text(encoding="utf-8")
    assert page == certified_heads.markdown(stored("certified_heads.json"))


def test_table_of_difficulty():
    table = (RESULTS / "head_difficulty.md").read_text(encoding="utf-8")
    assert table == head_difficulty.markdown(stored("head_difficulty.json"))


def test_table_of_noisy_fine_tuning():
    page = (RESULTS / "noisy_fine_tuning.md").read_text(encoding="utf-8")
    assert page == noisy_fine_tuning.table(stored("noisy_fine_tuning.json")["cases"])
