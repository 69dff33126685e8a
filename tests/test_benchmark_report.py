import json
import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks import main_job
from benchmarks.common.report import write_json
from benchmarks.main_job_report import order_of_times


def test_order_of_times_is_spearman_with_never_last():
    times = np.array([[0, 1, 5, np.inf, 9], [0, 3, 2, 9, 10]])
    found = order_of_times(times)
    finite = np.where(np.isinf(times), 99, times)
    mean_ranks = stats.rankdata(finite, axis=1).mean(0)
    assert found["estimate"] == pytest.approx(
        np.corrcoef(np.arange(5), mean_ranks)[0, 1], abs=1e-6
    )
    assert found["tied_pairs"] == 0
    assert found["at_once"] == pytest.approx(2 / 10)


def test_seeds_that_agree_are_no_proof():
    times = np.zeros((5, 5))
    times[:, -1] = [9, 10, 16, 2, 3]  # the hardest stratum alone takes longer
    found = order_of_times(times)
    assert found["estimate"] == pytest.approx(1 / np.sqrt(2), abs=1e-6)
    assert found["p"] >= 1 / 5  # one order of five puts it last by chance
    assert found["low"] < 0 and found["high"] > 0.95
    assert found["tied_pairs"] == pytest.approx(6 / 10)
    assert found["at_once"] == pytest.approx(4 / 5)
    assert f"one-sided p above 0: {found['p']:.1g}" in found["text"]


def test_a_perfect_order_is_seen():
    found = order_of_times(np.tile(np.arange(5.0), (5, 1)))
    assert found["estimate"] == 1 and found["p"] == pytest.approx(1 / 120, abs=1e-6)
    assert found["low"] < 0.9


def test_equal_times_say_nothing():
    found = order_of_times(np.zeros((2, 3)))
    assert (found["estimate"], found["low"], found["high"]) == (0, -1, 1)
    assert found["p"] == 1 and found["tied_pairs"] == found["at_once"] == 1


def test_one_seed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main_job", "--seeds", "1"])
    with pytest.raises(SystemExit):
        main_job.main()
    assert "--seeds must be at least 2, got 1" in capsys.readouterr().err


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out" / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
