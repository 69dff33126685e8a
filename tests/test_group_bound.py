import numpy as np
import pytest

from benchmarks.group_bound import BOUNDS, flatness


def stratum(shift, bound, seed):
    each = (np.random.default_rng(seed).normal(size=20) + shift).tolist()
    return {
        "b1": float(np.mean(each)),
        "b1_std": float(np.std(each, ddof=1)),
        "b1_each": each,
        **dict.fromkeys(BOUNDS, bound),
    }


def test_flat_and_rising_strata_are_told_apart():
    flat = flatness([stratum(10.0, 2.0 * k, k) for k in (1, 2, 3, 4, 5)])
    rising = flatness([stratum(10.0 + k, 2.0, k) for k in (1, 2, 3, 4, 5)])
    assert flat["b1_anova_p"] > 0.01 > rising["b1_anova_p"]
    assert flat["b1_range_over_std"] < 1 < rising["b1_range_over_std"]
    assert flat["coupled_last_over_first"] == pytest.approx(5)
    assert rising["scalar_last_over_first"] == pytest.approx(1)
