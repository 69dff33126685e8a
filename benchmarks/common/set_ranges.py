"""Disjoint forget sets along the whole range of difficulty.

A test about forget sets needs many of them, with no example in common. They are windows
of the ranking: the first one holds the easiest examples, the last one the hardest.
Models behave like retrained ones on most examples, so easy sets have nothing to forget.
Where there is room, six of ten sets therefore lie in the hardest two fifths.

>>> [one.start for one in windows(100, 4, 5)]
[0, 56, 60, 78, 96]
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opacus_pi.difficulty.forget_sets import ranking

HARD = 0.4  # share of the examples that counts as hard
IN_HARD = 0.6  # share of the sets in it
_ROOM = 1.5  # hard examples for each one in a set; the others are left for the search

Indices = NDArray[np.int64]


def windows(num_examples: int, size: int, count: int) -> list[range]:
    """Return the positions in the ranking of each set, easiest set first.

    Args:
        num_examples: Number of examples.
        size: Examples in a set.
        count: Number of sets, at least 2.

    Raises:
        ValueError: The sets do not fit without a common example.
    """
    if count < 2 or count * size > num_examples:
        raise ValueError(
            f"{count} disjoint sets of {size} need at least 2 sets and "
            f"{count * size} examples; got {num_examples} examples. Use smaller or "
            "fewer sets."
        )
    border = round((1 - HARD) * num_examples)
    hard = round(IN_HARD * count)
    starts = np.linspace(0, num_examples - size, count)
    roomy = _ROOM * hard * size <= num_examples - border
    if roomy and (count - hard) * size <= border:
        easy = np.linspace(0, border - size, count - hard)
        starts = np.concatenate([easy, np.linspace(border, num_examples - size, hard)])
    return [range(start, start + size) for start in starts.astype(int)]


def sets_along_range(scores: ArrayLike, size: int, count: int) -> list[Indices]:
    """Return the sorted indices of each set, easiest set first; see ``windows``."""
    ranked = ranking(scores)
    return [np.sort(ranked[list(w)]) for w in windows(len(ranked), size, count)]


def set_apart(scores: ArrayLike, size: int, count: int) -> Indices:
    """Return a set of hard examples that belong to none of the sets along the range.

    Args:
        scores: Difficulty of each example.
        size: Examples in a set.
        count: Number of sets along the range.

    Raises:
        ValueError: Fewer than ``size`` hard examples are left.
    """
    ranked = ranking(scores)
    used = {place for window in windows(len(ranked), size, count) for place in window}
    border = round((1 - HARD) * len(ranked))
    left = [place for place in range(border, len(ranked)) if place not in used]
    if len(left) < size:
        raise ValueError(
            f"the search of settings needs {size} hard examples outside the {count} "
            f"forget sets; got {len(left)}. Use smaller or fewer sets."
        )
    chosen = np.linspace(0, len(left) - 1, size).astype(int)
    return np.sort(ranked[np.array(left)[chosen]])


def pairs_within_classes(
    scores: ArrayLike, labels: ArrayLike, excluded: ArrayLike, size: int
) -> tuple[Indices, Indices]:
    """Return two equally hard sets that span the difficulty within each class.

    Each class is ranked by itself. Pairs of neighbours in its ranking are taken at even
    distances, from its easiest to its hardest examples. One example of a pair goes into
    the first set and the other into the second; which of them is the harder one
    alternates. So both sets have the same classes, and the same ranks up to one place.

    Args:
        scores: Difficulty of each example, ``(n,)``.
        labels: The class of each example, ``(n,)``.
        excluded: Indices that belong to neither set.
        size: Most examples in a set, the same number from each class. A class with too
            few examples gives as many pairs as it has.

    Returns:
        The sorted indices of both sets.

    Raises:
        ValueError: No class has two examples to give, or ``size`` is smaller than the
            number of classes.
    """
    classes, ranked = np.asarray(labels), ranking(scores)
    ranked = ranked[~np.isin(ranked, np.asarray(excluded, dtype=np.int64))]
    names = np.unique(classes)
    found: tuple[list[int], list[int]] = ([], [])
    for turn, name in enumerate(names):
        own = ranked[classes[ranked] == name]
        number = min(size // len(names), len(own) // 2)
        starts = np.linspace(0, len(own) - 2, number).astype(int) if number else []
        for place, start in enumerate(starts):
            harder = (place + turn) % 2
            found[0].append(own[start + harder])
            found[1].append(own[start + 1 - harder])
    if not found[0]:
        raise ValueError(
            f"two sets of {size} examples of {len(names)} classes cannot be chosen: "
            "they would be empty. Use larger sets or more examples."
        )
    one, other = (np.sort(np.array(indices, dtype=np.int64)) for indices in found)
    return one, other
