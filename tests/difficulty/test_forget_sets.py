import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.difficulty.forget_sets import (
    by_class,
    difficulty_strata,
    num_at_top,
    random_forget_set,
    ranking,
    retain_indices,
    ties,
    top_k,
)

cutting = pytest.mark.filterwarnings("ignore:A forget set contains only a part")


def strata_by_hand(scores, size):
    """App. D with Python's own sort."""
    n = len(scores)
    draw = np.random.default_rng(0).permutation(n)
    order = sorted(range(n), key=lambda i: (scores[i], draw[i]))
    centres = {"q1": n // 4, "q2": n // 2, "q3": 3 * n // 4}
    wanted = {"first": order[:size], "last": order[n - size :]}
    for name, centre in centres.items():
        low = centre - size // 2
        assert low >= 0
        wanted[name] = order[low : low + size]
    return {name: sorted(chosen) for name, chosen in wanted.items()}


@cutting
@given(st.data())
def test_strata_equal_the_definition_at_every_size(data):
    scores = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=60))
    size = data.draw(st.integers(1, len(scores) // 2))
    strata = difficulty_strata(np.array(scores), size)
    assert list(strata) == ["first", "q1", "q2", "q3", "last"]
    for name, wanted in strata_by_hand(scores, size).items():
        assert strata[name].dtype == np.int64
        assert strata[name].tolist() == wanted  # also: size entries each


def test_strata_of_the_paper():
    scores = np.random.default_rng(0).permutation(50_000).astype(float)
    strata = difficulty_strata(scores, 1000)
    ranges = {name: (scores[i].min(), scores[i].max()) for name, i in strata.items()}
    assert ranges == {
        "first": (0, 999),
        "q1": (12_000, 12_999),
        "q2": (24_500, 25_499),
        "q3": (37_000, 37_999),
        "last": (49_000, 49_999),
    }


@given(st.lists(st.integers(0, 99), min_size=4, max_size=30, unique=True), st.randoms())
def test_strata_follow_a_reordering_of_the_examples(scores, random):
    order = list(range(len(scores)))
    random.shuffle(order)
    size = len(scores) // 3
    plain = difficulty_strata(scores, size)
    moved = difficulty_strata(np.array(scores)[order], size)
    for name, chosen in moved.items():
        assert sorted(order[i] for i in chosen) == plain[name].tolist()


def test_strata_rank_infinite_scores():
    strata = difficulty_strata([np.inf, 0.0, -np.inf, 1.0], 1)
    assert strata["first"] == [2]
    assert strata["last"] == [0]


@cutting
@given(st.lists(st.integers(0, 3), min_size=4, max_size=30), st.integers(0, 9))
def test_top_k_is_the_last_stratum(scores, seed):
    size = 1 + seed % (len(scores) // 2)
    draws = [np.random.default_rng(seed) for _ in range(2)] if seed % 2 else [None] * 2
    last = difficulty_strata(scores, size, draws[0])["last"]
    assert top_k(scores, size, draws[1]).tolist() == last.tolist()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30, unique=True))
def test_ranking_without_ties_is_argsort(scores):
    scores = np.unique(np.round(scores, 3))[::-1]
    assert ranking(scores).tolist() == np.argsort(scores).tolist()


def test_ties_are_in_one_random_order():
    scores = np.repeat([1.0, 0.0], 50)
    first = ranking(scores)
    assert sorted(first[:50]) == list(range(50, 100))
    assert sorted(first[50:]) == list(range(50))
    assert first.tolist() == ranking(scores).tolist()  # the same in every process
    assert abs(np.diff(first[50:])).mean() > 5  # nor is it the data set's
    other = ranking(scores, np.random.default_rng(1))
    assert other.tolist() != first.tolist()


@cutting
def test_every_example_of_a_tie_is_as_likely():
    generator, counts = np.random.default_rng(3), np.zeros(8)
    for _ in range(4000):
        counts[top_k([1.0] * 7 + [0.0], 3, generator)] += 1
    assert counts[7] == 0
    assert abs(counts[:7] / 4000 - 3 / 7).max() < 4.5 * np.sqrt(12 / 49 / 4000)


@cutting
def test_the_hardest_are_not_one_class_where_a_sorted_data_set_ties():
    labels = np.repeat(np.arange(10), 20)
    assert len(set(labels[top_k(np.ones(200), 10)])) > 4


def test_rounding_makes_no_difference_of_difficulty():
    def levels_by_hand(values):
        ordered, found = sorted(set(values)), {}
        for place, value in enumerate(ordered):
            low = ordered[max(0, place - 1)]
            same = math.isclose(low, value, rel_tol=1e-12)
            found[value] = found.get(low, 0) + (not same)
        return [found[v] for v in values]

    eps = np.finfo(float).eps
    values = [3.0, 3 * (1 + eps), 3 * (1 - 5 * eps), 3 * (1 + 1e-9), -3.0, 0.0]
    values += [5e-324, math.inf, -math.inf, math.inf, -3 * (1 + eps), 1e308, -1e308]
    assert ties(values).tolist() == levels_by_hand(values)
    assert ties(values).max() == 8


def test_a_cut_through_a_tie_is_warned_of():
    scores = [5.0, 5 * (1 + 1e-15), 1.0, 5.0, 2.0, 3.0]
    with pytest.warns(UserWarning, match="2 of 3 in 'hardest'.*max_grad_norm") as seen:
        top_k(scores, 2)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="1 of 3 in 'last'. ") as seen:
        difficulty_strata(scores, 1)
    assert seen[0].filename == __file__


def test_a_set_with_all_tied_examples_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_k([5.0, 5.0, 1.0, 5.0, 2.0, 3.0], 3)
        ranking([1.0, 1.0])
        difficulty_strata(np.arange(20.0), 3)


def test_random_forget_set_is_uniform_and_repeatable():
    chosen = random_forget_set(10, 4, np.random.default_rng(5))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    again = random_forget_set(10, 4, np.random.default_rng(5))
    np.testing.assert_array_equal(chosen, again)
    generator = np.random.default_rng(0)
    counts = sum(
        np.bincount(random_forget_set(10, 4, generator), minlength=10)
        for _ in range(5000)
    )
    assert abs(counts / 5000 - 0.4).max() < 4 * np.sqrt(0.24 / 5000)


def test_by_class():
    labels = np.array([1, 0, 1, 2, 1, 0])
    assert by_class(labels, 1).tolist() == [0, 2, 4]
    some = by_class(labels, 1, size=2, generator=np.random.default_rng(0))
    assert len(some) == 2
    assert set(some) <= {0, 2, 4}


@given(st.integers(2, 40), st.data())
def test_retain_and_forget_partition_the_examples(n, data):
    forget = data.draw(
        st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True)
    )
    retain = retain_indices(n, forget)
    assert retain.dtype == np.int64
    assert retain.tolist() == [i for i in range(n) if i not in forget]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: difficulty_strata(np.arange(10.0), 6),
            r"size must .*got 6\. .* half of the 10",
        ),
        (lambda: difficulty_strata(np.arange(10.0), 0), "size must .*got 0"),
        (
            lambda: difficulty_strata(np.arange(10.0), 2.5),
            "size must be a whole .*, got 2.5",
        ),
        (lambda: difficulty_strata([0.0, np.nan, 1.0], 1), r"NaN at \[1\]"),
        (lambda: difficulty_strata(np.zeros((3, 2)), 1), r"shape \(3, 2\)"),
        (lambda: difficulty_strata([], 1), r"shape \(0,\)"),
        (lambda: top_k([0.0, 1.0], 2), r"size must .*got 2\. .* all examples but one"),
        (
            lambda: random_forget_set(3, 3, np.random.default_rng(0)),
            "size must .*got 3",
        ),
        (lambda: by_class([0, 1, 1], 2), r"label must .*got 2\. .* labels are \[0 1\]"),
        (
            lambda: by_class([1, 1], 1),
            "label must leave at least one example in the retain set, got 1",
        ),
        (lambda: by_class([0, 1, 1], 1, size=1), "generator must .*got None"),
        (
            lambda: by_class([0, 1], 1, size=2, generator=np.random.default_rng(0)),
            r"size must .*\[1, 1\], got 2\.",
        ),
        (
            lambda: retain_indices(4, []),
            r"forget_indices must contain an example, got \[\]",
        ),
        (lambda: retain_indices(4, [1, 1]), "must not have duplicates"),
        (lambda: retain_indices(4, [4]), r"forget_indices must be in \[0, 4\), got 4"),
        (
            lambda: retain_indices(4, [-1]),
            r"forget_indices must be in \[0, 4\), got -1",
        ),
        (lambda: retain_indices(4, range(4)), "all 4 examples"),
        (lambda: retain_indices(4, [True, False]), "flatnonzero"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_those_at_the_top_are_counted_up_to_rounding():
    assert num_at_top([1.0, 3.0, 3.0 * (1 + 1e-15), 2.0]) == 2
    assert num_at_top([1.0, 2.0]) == 1
    assert num_at_top([np.inf, np.inf, 5.0]) == 2
