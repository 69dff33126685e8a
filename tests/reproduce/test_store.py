import json

import numpy as np
import pytest

from benchmarks.reproduce.store import cached_arrays, cached_json, path_of


def counting(value):
    def compute():
        compute.calls += 1
        return value

    compute.calls = 0
    return compute


def test_a_result_is_computed_once_and_read_back_equal(tmp_path):
    compute = counting({"rho": [0.1, 2.5]})
    first = cached_json(tmp_path, "study", {"seed": 1}, compute)
    second = cached_json(tmp_path, "study", {"seed": 1}, compute)
    assert first == second == {"rho": [0.1, 2.5]}
    assert compute.calls == 1


@pytest.mark.parametrize("facts", [{"seed": 2}, {"seed": 1, "lr": 0.1}, {}])
def test_other_facts_are_another_result(tmp_path, facts):
    cached_json(tmp_path, "study", {"seed": 1}, counting("one"))
    assert cached_json(tmp_path, "study", facts, counting("two")) == "two"


def test_another_kind_is_another_result(tmp_path):
    cached_json(tmp_path, "study", {"seed": 1}, counting("one"))
    assert cached_json(tmp_path, "search", {"seed": 1}, counting("two")) == "two"


def test_half_a_file_is_computed_again(tmp_path):
    cached_json(tmp_path, "study", {"seed": 1}, counting("one"))
    path = path_of(tmp_path, "study", {"seed": 1}, ".json")
    path.write_text(path.read_text()[:-5])
    assert cached_json(tmp_path, "study", {"seed": 1}, counting("again")) == "again"
    assert json.loads(path.read_text())["facts"] == {"seed": 1}


def test_facts_that_are_no_number_are_refused(tmp_path):
    with pytest.raises(ValueError):
        path_of(tmp_path, "study", {"seed": float("nan")}, ".json")


def test_arrays_are_computed_once(tmp_path):
    compute = counting({"loss": np.arange(3.0)})
    for _ in range(2):
        found = cached_arrays(tmp_path, "scores", {"seed": 1}, compute)
        np.testing.assert_array_equal(found["loss"], [0, 1, 2])
    assert compute.calls == 1
