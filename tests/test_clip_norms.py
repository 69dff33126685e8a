"""Ties by clip norm: what the benchmark computes, and that its results are its own."""

from dataclasses import replace

import pytest

from benchmarks import clip_norms as benchmark
from benchmarks.clip_norms import CASES, measure
from benchmarks.main_job import SETTINGS
from tests.benchmark_results import check_results


def short(name):
    """One epoch of a case."""
    case = CASES[name]
    return replace(case, recipe=replace(case.recipe, num_epochs=1))


def test_a_small_clip_norm_ties_all_and_a_large_one_fewer():
    tight, loose = (measure(short(name), 0) for name in ("0.5", "20"))
    assert tight["num_at_top"] > 0.9 * tight["num_examples"] == 0.9 * 1437
    assert 1 <= loose["num_at_top"] < 0.5 * loose["num_examples"]
    assert tight["worst_case_epsilon"] == loose["worst_case_epsilon"]
    assert loose["epsilon_quantiles"][2] < tight["epsilon_quantiles"][2]


def test_the_case_of_clip_norm_1_is_the_main_jobs_run():
    main, recipe = SETTINGS["digits"], CASES["1"].recipe
    assert (recipe.num_epochs, recipe.learning_rate) == (
        main.dp_epochs,
        main.dp_learning_rate,
    )
    for case in CASES.values():
        product = case.recipe.learning_rate * case.recipe.max_grad_norm
        assert product == pytest.approx(main.dp_learning_rate)


def test_the_results_are_of_the_cases_as_they_are():
    check_results(benchmark)
