"""The overhead benchmark's table says whether each bar holds."""

import json

import numpy as np
import pytest
import torch

from benchmarks.overhead import __main__ as overhead
from benchmarks.overhead.table import Row, markdown
from benchmarks.overhead.timing import interleaved, interval, spread, timed
from benchmarks.overhead.tracking import num_calls


def measured(ratio):
    one = {"ratio": ratio, "range": [ratio - 0.1, ratio + 0.1]}
    return {"busy": one, "wall": one}


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("a", 1.0, 1.0), "holds"),
        (Row("a", 1.0, measured(0.9)), "holds"),
        (Row("a", 1.0, measured(1.05)), "missed by 0.050 (5.0 %)"),
        (Row("a", 1e-5, 2e-5, form=".1e"), "missed by 1.0e-05 (100.0 %)"),
    ],
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict
    assert verdict in markdown([row]).splitlines()[-1]


def test_spread():
    assert spread([3.0, 1.0, 2.0])["ratio"] == 2.0
    assert spread([3.0, 1.0, 2.0])["range"] == [1.0, 3.0]


@pytest.mark.parametrize("n", [6, 9, 30, 101])
def test_intervals_contain_the_median_as_often_as_they_say(n):
    draws = torch.rand(2000, n, generator=torch.Generator().manual_seed(0))
    found = [interval(row) for row in draws.tolist()]
    assert np.mean([low <= 0.5 <= high for low, high in found]) > 0.94


def test_what_is_added_is_the_difference_of_a_step_each():
    found = interleaved(lambda: None, lambda: sum(range(200_000)), 9)
    least, most = found["added_microseconds"]["interval"]
    assert 100 < least <= found["added_microseconds"]["median"] <= most


def test_calls_of_a_step_are_counted():
    class Training:
        def step(self):
            len("")
            max(1, 2)

    assert num_calls(Training()) == 3 + 1  # and that which ends the count


def test_on_a_gpu_the_time_between_its_events_is_taken(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def elapsed_time(self, end):
            assert said[-1] == "wait"
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    found = timed(lambda: said.append("task"), "cuda:1")
    assert found["busy"] == 0.25 and found["wall"] < 0.25
    assert said == ["wait", "record", "task", "record", "wait"]


def test_interleaving_calls_both_alike():
    calls = []
    found = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), 2)
    assert "".join(calls) == "abbaabba" and found["rounds"] == 2


def test_cases_are_written_as_they_come_and_resumed(tmp_path, monkeypatch):
    asked = []

    def measure(case):
        asked.append(case)
        if case == "two" and len(asked) == 2:
            raise KeyboardInterrupt
        return {"ratio": len(asked)}

    def rows(found):
        yield from (Row(case, 2.0, float(one["ratio"])) for case, one in found.items())

    section = overhead.Section(["one", "two"], measure, rows)
    monkeypatch.setattr(overhead, "SECTIONS", {"toy": section})
    path = tmp_path / "overhead_toy.json"
    with pytest.raises(KeyboardInterrupt):
        overhead.run("toy", path, resume=False)
    assert list(json.loads(path.read_text())) == ["one"]
    overhead.run("toy", path, resume=True)
    assert asked == ["one", "two", "two"]
    lines = overhead.table(tmp_path).splitlines()
    assert len(lines) == 4 and "holds" in lines[2] and "missed by 1.000" in lines[3]
