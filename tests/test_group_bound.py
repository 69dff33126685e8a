import numpy as np
import pytest

from benchmarks.common import data
from benchmarks.common.training import Recipe
from benchmarks.group_bound import BOUNDS, Settings, flatness, study


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


def test_other_images_and_another_recipe_are_what_is_trained():
    few = data.load("digits", num_train=60)
    settings = Settings(estimates=2, checkpoints=2, stratum_size=4)
    recipe = Recipe("mlp", 2, 20, 0.1, noise_std=0.1)
    rows = study(settings, few, recipe)
    assert len(rows) == 6 and all(len(row["b1_each"]) == 2 for row in rows)
    assert rows == study(settings, few, recipe)
    assert rows != study(settings, few, Recipe("mlp", 3, 20, 0.1, noise_std=0.1))
