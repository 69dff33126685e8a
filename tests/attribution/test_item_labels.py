"""Labels show that a data set which augments also moves its examples."""

import numpy as np
import pytest

from opacus_pi.attribution.item_labels import ItemLabels
from opacus_pi.attribution.samples import checksums_of_entries

NUM = 200


def delivered(first, now, *, size=10):
    """Return the labels after two passes over all indices, in random order."""
    labels, rng = ItemLabels(), np.random.default_rng(0)
    for part in np.split(rng.permutation(NUM), NUM // size):
        labels.add(part, first[part])
    for part in np.split(rng.permutation(NUM), NUM // size):
        labels.compare(part, now[part])
    return labels


def state(*pairs):
    """Return ``have_moved`` and ``are_kept`` for parts with these values."""
    first, now = (np.stack(parts, axis=1) for parts in zip(*pairs, strict=True))
    labels = delivered(first, now)
    return labels.have_moved, labels.are_kept


RNG = np.random.default_rng(1)
CLASSES, IDS = RNG.integers(0, 3, NUM), RNG.permutation(NUM) + 7
EQUAL, OTHER = np.ones(NUM, np.int64), RNG.permutation(NUM)
INDEX = checksums_of_entries(np.arange(NUM, dtype=np.float32)[:, None])
NOISE = RNG.integers(10**6, 10**9, (2, NUM))
FLAGS = RNG.integers(0, 2, (2, NUM))
RARE = (np.arange(NUM) == 3).astype(np.int64)
SAME, MOVED = (CLASSES, CLASSES), (CLASSES, CLASSES[OTHER])


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([SAME], (False, True)),
        ([MOVED], (True, False)),
        ([(IDS, IDS[OTHER])], (True, False)),
        ([MOVED, (EQUAL, EQUAL)], (True, False)),
        ([MOVED, (INDEX, INDEX)], (True, False)),
        ([MOVED, tuple(NOISE)], (True, False)),
        ([MOVED, tuple(FLAGS)], (True, False)),
        ([MOVED, (RARE, RARE[OTHER])], (True, False)),
        ([SAME, tuple(FLAGS)], (False, True)),
        ([SAME, tuple(NOISE)], (False, True)),
        ([tuple(NOISE)], (False, False)),
        ([(EQUAL, EQUAL)], (False, False)),
        ([(INDEX, INDEX)], (False, False)),
    ],
)
def test_what_two_passes_show(pairs, expected):
    assert state(*pairs) == expected


def test_an_exchange_of_two_examples_is_found():
    now = CLASSES.copy()
    one, two = np.flatnonzero(CLASSES == 0)[0], np.flatnonzero(CLASSES == 1)[0]
    now[[one, two]] = now[[two, one]]
    assert state((CLASSES, now)) == (True, False)


def test_labels_that_are_not_always_known():
    labels = ItemLabels()
    labels.add(np.array([0, 9]), None)
    labels.compare(np.array([0, 9]), np.array([[1], [2]]))
    labels.add(np.array([1, 2]), np.array([[5], [6]]))
    labels.add(np.array([500]), np.array([[5, 5]]))
    labels.compare(np.array([0, 500, 1]), np.array([[1], [2], [5]]))
    assert (labels.have_moved, labels.are_kept) == (False, True)
    labels.compare(np.array([0, 500, 1]), np.array([[1], [2], [6]]))
    assert (labels.have_moved, labels.are_kept) == (True, False)
