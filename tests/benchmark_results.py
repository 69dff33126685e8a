"""What is stored of a benchmark belongs to its cases as they are today."""

import json
from pathlib import Path

from benchmarks.facts import facts_of

ROOT = Path(__file__).parents[1]


def check_results(benchmark, settings=facts_of):
    """Three seeds of every case, and a table that is made of them."""
    out = ROOT / benchmark.OUT
    found = json.loads(out.read_text())["cases"]
    for name, case in benchmark.CASES.items():
        assert found[name]["settings"] == json.loads(json.dumps(settings(case)))
        assert len(found[name]["seeds"]) == 3
    assert out.with_suffix(".md").read_text(encoding="utf-8") == benchmark.table(found)
