"""What is stored of a benchmark belongs to its cases as they are today."""

import json
from pathlib import Path

from benchmarks.common.facts import facts_of

ROOT = Path(__file__).parents[1]


def check_results(benchmark, settings=facts_of):
    """Three seeds of every case, and a table that is made of them."""
    out = ROOT / benchmark.OUT
    found = json.loads(out.read_text())["cases"]
    assert set(found) == set(benchmark.CASES)
    for name, one in found.items():
        facts = json.loads(json.dumps(settings(benchmark.CASES[name])))
        assert one["settings"] == facts
        assert len(one["seeds"]) == 3
    assert out.with_suffix(".md").read_text(encoding="utf-8") == benchmark.table(found)
