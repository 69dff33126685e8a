import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.report import rank_correlation, write_json


def test_rank_correlation_is_spearman_with_never_last():
    times = np.array([[0, 1, 5, np.inf], [0, 3, 2, 9]])
    found = rank_correlation(times)
    rho = [
        stats.spearmanr(range(4), row).statistic for row in ([0, 1, 5, 99], times[1])
    ]
    assert found["rho"] == pytest.approx(np.mean(rho))
    half = stats.t.ppf(0.975, 1) * np.std(rho, ddof=1) / np.sqrt(2)
    low, high = found["interval"]
    assert low == pytest.approx(max(-1, np.mean(rho) - half))
    assert high == pytest.approx(min(1, np.mean(rho) + half))
    assert found["tied_pairs"] == 0


def test_seeds_without_differences_say_nothing():
    found = rank_correlation(np.array([[0.0, 0, 0], [0, 0, 4]]))
    assert found["num_seeds"] == 1
    assert found["interval"] == [None, None]
    assert found["tied_pairs"] == pytest.approx((3 + 1) / 6)
    assert rank_correlation(np.zeros((2, 3)))["rho"] is None


def test_equal_seeds_give_a_point():
    found = rank_correlation(np.array([[0.0, 0, 4], [0, 0, 7]]))
    assert found["interval"] == [pytest.approx(found["rho"])] * 2


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out" / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
