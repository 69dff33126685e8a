"""The usual case, a whole batch of distinct examples, and what only looks like it."""

import numpy as np
import pytest
import torch

from opacus_pi.attribution import UNKNOWN, Tracker
from opacus_pi.attribution.batch_rows import SampledRows, row_checksums
from opacus_pi.attribution.evidence import NOBODY, Delivery, Stream


def batch(size=3, width=4):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(size))


def passes(tracker, inputs, sizes):
    tracker.reached(tracker.bind(inputs))
    return tracker.passes(sizes)


def test_a_whole_batch_is_known_by_its_positions():
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 4, 9], x)
    (forward,) = passes(tracker, [x], [3])
    assert forward.examples() == [7, 4, 9] and forward.rows.tolist() == [7, 4, 9]
    assert tracker.counts["by_storage"] == 3


@pytest.mark.parametrize("positions", [[7, 7, 9], [7, -1, 9]])
def test_positions_that_are_no_distinct_examples_are_looked_at(positions):
    tracker, x = Tracker(), batch()
    tracker.delivered(positions, x)
    (forward,) = passes(tracker, [x], [3])
    assert forward.examples() is None
    assert forward.rows.tolist() == positions
    known = sum(p != UNKNOWN for p in positions)
    assert tracker.counts["by_storage"] == known
    assert tracker.counts["unattributed"] == 3 - known


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        (lambda x: x[1:], [4, 9]),
        (lambda x: x.clone(), [7, 4, 9]),
        (lambda x: x[[2, 0]].clone(), [9, 7]),
    ],
)
def test_parts_and_copies_are_looked_at(inputs, rows):
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 4, 9], x)
    (forward,) = passes(tracker, [inputs(x)], [len(rows)])
    assert forward.examples() is None and forward.rows.tolist() == rows


def test_a_whole_batch_of_another_size_than_the_gradients():
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 4, 9], x)
    tracker.reached(tracker.bind([x]))
    with pytest.warns(UserWarning, match="2 rows are unattributed"):
        assert tracker.attribute([2]).tolist() == [UNKNOWN] * 2


def test_an_empty_batch_has_no_distinct_examples():
    assert not Delivery([], Stream()).are_distinct
    assert not Delivery([NOBODY], Stream()).are_distinct
    assert not Delivery(None, Stream()).are_distinct
    assert Delivery(None, Stream()).rows is None


@pytest.mark.parametrize("permuted", [False, True])
def test_checksums_are_of_the_moment_of_delivery(permuted):
    tracker, x = Tracker(), batch(4)
    tracker.delivered([5, 6, 7, 8], x)
    if permuted:  # in place: the memory is the same, its rows are others
        x.copy_(x[[1, 0, 3, 2]].clone())
    (forward,) = passes(tracker, [x], [4])
    expected = [6, 5, 8, 7] if permuted else [5, 6, 7, 8]
    assert forward.rows.tolist() == expected


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("width", [3, 256, 257, 1000])
def test_sampled_rows_are_a_small_copy_of_entries(dim, width):
    x = batch(5, width)
    given = x if dim == 0 else x.T.contiguous()
    sampled = SampledRows(given, dim)
    before = row_checksums(x, 0)[1]
    given.zero_()
    np.testing.assert_array_equal(sampled.checksums(), before)
    assert sampled.width == width
