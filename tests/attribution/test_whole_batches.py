"""The usual case, a whole batch of distinct examples, and what only looks like it."""

import numpy as np
import pytest
import torch

from opacus_pi.attribution import UNATTRIBUTED, Tracker
from opacus_pi.attribution.delivery import LEFT_OUT, Delivery, LoaderPass
from opacus_pi.attribution.samples import DelayedChecksums, sample_checksums


def batch(size=3, width=4):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(size))


def passes(tracker, inputs, sizes):
    tracker.mark_backward(tracker.bind(inputs))
    return tracker.take_attributed(sizes)


def test_a_whole_batch_is_known_by_its_positions():
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 4, 9], x)
    (forward,) = passes(tracker, [x], [3])
    assert forward.distinct_indices() == [7, 4, 9] and forward.indices.tolist() == [
        7,
        4,
        9,
    ]
    assert tracker.counts["by_storage"] == 3


def test_positions_that_are_no_distinct_examples_are_looked_at():
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 7, 9], x)
    (forward,) = passes(tracker, [x], [3])
    assert forward.distinct_indices() is None
    assert forward.indices.tolist() == [7, 7, 9]
    assert tracker.counts["by_storage"] == 3


def test_negative_positions_are_unknown():
    tracker, x = Tracker(), batch()
    tracker.delivered([7, -1, 9], x)
    (forward,) = passes(tracker, [x], [3])
    assert forward.distinct_indices() is None
    assert tracker.counts["unattributed"] == 3


@pytest.mark.parametrize(
    ("inputs", "indices"),
    [
        (lambda x: x[1:], [4, 9]),
        (lambda x: x.clone(), [7, 4, 9]),
        (lambda x: x[[2, 0]].clone(), [9, 7]),
    ],
)
def test_parts_and_copies_are_looked_at(inputs, indices):
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 4, 9], x)
    (forward,) = passes(tracker, [inputs(x)], [len(indices)])
    assert forward.distinct_indices() is None and forward.indices.tolist() == indices


def test_a_whole_batch_of_another_size_than_the_gradients():
    tracker, x = Tracker(), batch()
    tracker.delivered([7, 4, 9], x)
    tracker.mark_backward(tracker.bind([x]))
    with pytest.warns(UserWarning, match="2 samples are unattributed"):
        assert tracker.attribute([2]).tolist() == [UNATTRIBUTED] * 2


def test_an_empty_batch_has_no_distinct_examples():
    assert not Delivery([], LoaderPass()).are_distinct
    assert not Delivery([LEFT_OUT], LoaderPass()).are_distinct
    assert not Delivery(None, LoaderPass()).are_distinct
    assert Delivery(None, LoaderPass()).index_array is None


@pytest.mark.parametrize("permuted", [False, True])
def test_checksums_are_of_the_moment_of_delivery(permuted):
    tracker, x = Tracker(), batch(4)
    tracker.delivered([5, 6, 7, 8], x)
    if permuted:  # in place: the memory is the same, its samples are others
        x.copy_(x[[1, 0, 3, 2]].clone())
    (forward,) = passes(tracker, [x], [4])
    expected = [6, 5, 8, 7] if permuted else [5, 6, 7, 8]
    assert forward.indices.tolist() == expected


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("width", [3, 256, 257, 1000])
def test_delayed_checksums_are_of_a_small_copy_of_entries(dim, width):
    x = batch(5, width)
    given = x if dim == 0 else x.T.contiguous()
    sampled = DelayedChecksums(given, dim)
    before = sample_checksums(x, 0)[1]
    given.zero_()
    np.testing.assert_array_equal(sampled.checksums, before)
    assert sampled.width == width
