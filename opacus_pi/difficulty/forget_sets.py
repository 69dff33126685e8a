"""Forget sets of chosen difficulty, from any vector of scores.

Every choice by score is cut from one ``ranking``. Under DP-SGD many examples may share
the largest loss: those that are clipped in every update, and those whose estimate was
reduced to this worst case. Their order in the ranking is random, so that neither the
data set's order nor its classes decide which of them are chosen.

>>> import numpy as np
>>> strata = difficulty_strata(np.arange(100.0), size=4)
>>> {name: indices.tolist() for name, indices in strata.items()}
... # doctest: +NORMALIZE_WHITESPACE
{'first': [0, 1, 2, 3], 'q1': [23, 24, 25, 26], 'q2': [48, 49, 50, 51],
 'q3': [73, 74, 75, 76], 'last': [96, 97, 98, 99]}
"""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect

__all__ = [
    "by_class",
    "difficulty_strata",
    "num_at_top",
    "random_forget_set",
    "ranking",
    "retain_indices",
    "ties",
    "top_k",
]

Indices = NDArray[np.int64]
_SAME = 1e-12  # relative difference of scores that rounding alone explains
_SEED = 0
_CUT = (
    "A forget set contains only some of the examples that have equal scores: {cuts}. "
    "Which of them it contains is random (see generator) and says nothing about their "
    "difficulty. Choose a size that includes all of them or none. Privacy losses are "
    "equal where examples are clipped in every update (train with a larger "
    "max_grad_norm), or where estimates were cut to the worst case (use another order, "
    "such as 2)."
)


def ranking(scores: ArrayLike, generator: np.random.Generator | None = None) -> Indices:
    """Return all examples in ascending order of score, with ties in random order.

    Scores count as equal (ties) if they differ by rounding alone: neighbours in order
    that differ by at most 1e-12 of the larger. Without ties this is ``argsort``.

    Args:
        scores: Difficulty of each example, shape ``(n,)``; higher is harder.
            Infinities are ranked, NaN is refused.
        generator: Source of the order among ties. Default: a new generator with seed 0,
            so that all choices from these scores agree with each other.

    Returns:
        int64 ``(n,)``: the easiest example first, the hardest last.

    Raises:
        ValueError: If a score is NaN.
    """
    tied = ties(scores)
    draw = np.random.default_rng(_SEED) if generator is None else generator
    return np.lexsort((draw.permutation(len(tied)), tied)).astype(np.int64)


def ties(scores: ArrayLike) -> Indices:
    """Return the level of each score; examples that tie have the same level.

    Args:
        scores: As in ``ranking``.

    Returns:
        int64 ``(n,)``: 0 for the lowest level, and so on.

    Raises:
        ValueError: If a score is NaN.
    """
    values = _numbers(scores)
    order = np.argsort(values, kind="stable")
    low, high = values[order][:-1], values[order][1:]
    with np.errstate(invalid="ignore", over="ignore"):
        gap = high - low  # NaN between equal infinities, infinite beside one
        near = np.isfinite(gap) & (gap <= _SAME * np.maximum(abs(low), abs(high)))
    levels = np.empty(len(values), dtype=np.int64)
    levels[order] = np.cumsum(np.append(False, (low != high) & ~near))
    return levels


def num_at_top(scores: ArrayLike) -> int:
    """Return how many examples share the largest score, up to rounding.

    Args:
        scores: As in ``ranking``, at least one.

    Returns:
        At least 1.

    Raises:
        ValueError: If a score is NaN.
    """
    levels = ties(scores)
    return int(np.count_nonzero(levels == levels.max()))


def difficulty_strata(
    scores: ArrayLike, size: int, generator: np.random.Generator | None = None
) -> dict[str, Indices]:
    """Return five forget sets of increasing difficulty, cut from the ranking.

    With the examples in ascending order of score, the sets are the first ``size``, the
    ``size`` around each quartile (at n/4, n/2 and 3n/4), and the last ``size``. They
    may overlap when ``size > n / 5``.

    Args:
        scores: Difficulty of each example, shape ``(n,)``; higher is harder. Privacy
            losses in the paper; infinities are ranked, NaN is refused.
        size: Number of examples in each set, at most ``n / 2``.
        generator: Source of the order among ties, as in ``ranking``.

    Returns:
        ``first``, ``q1``, ``q2``, ``q3``, ``last``: sorted int64 ``(size,)`` each.

    Raises:
        ValueError: If a score is NaN, or ``size`` is below 1 or above ``n / 2``.

    Warns:
        UserWarning: If a set contains only some of the examples with equal scores.

    Source: paper, Section 5.1 and Appendix D (there 1,000 of 50,000).
    """
    order = ranking(scores, generator)
    num_examples = len(order)
    _check_size(size, num_examples // 2, f"half of the {num_examples} examples")
    starts = {
        "first": 0,
        **{f"q{k}": k * num_examples // 4 - size // 2 for k in (1, 2, 3)},
        "last": num_examples - size,
    }
    strata = {
        name: np.sort(order[start : start + size]) for name, start in starts.items()
    }
    _warn_of_cuts(scores, strata)
    return strata


def top_k(
    scores: ArrayLike, size: int, generator: np.random.Generator | None = None
) -> Indices:
    """Return the examples with the largest scores as a set, sorted by index.

    The indices are in the data set's order, as in every forget set, not in order of
    score: for the hardest first use ``ranking(scores)[::-1][:size]``. For the same
    ``size``, this is the set ``last`` of :func:`difficulty_strata`.

    Args:
        scores: Difficulty of each example, shape ``(n,)``; higher is harder.
        size: Number of examples, below ``n``.
        generator: Source of the order among ties, as in ``ranking``.

    Returns:
        Sorted int64 ``(size,)``.

    Raises:
        ValueError: If a score is NaN, or ``size`` is below 1 or not below ``n``.

    Warns:
        UserWarning: If the set contains only some of the examples with equal scores.

    Source: paper, Section 6.4.
    """
    order = ranking(scores, generator)
    _check_size(size, len(order) - 1, "all examples but one")
    hardest = np.sort(order[-size:])
    _warn_of_cuts(scores, {"hardest": hardest})
    return hardest


def random_forget_set(
    num_examples: int, size: int, generator: np.random.Generator
) -> Indices:
    """Return a uniformly random set of examples, without replacement.

    Args:
        num_examples: Number of examples ``n`` to choose from.
        size: Number of examples in the set, below ``n``.
        generator: Source of randomness.

    Returns:
        Sorted int64 ``(size,)``.

    Raises:
        ValueError: If ``size`` is below 1 or not below ``n``.
    """
    _check_size(size, num_examples - 1, "all examples but one")
    return np.sort(_draw(np.arange(num_examples, dtype=np.int64), size, generator))


def by_class(
    labels: ArrayLike,
    label: int,
    size: int | None = None,
    generator: np.random.Generator | None = None,
) -> Indices:
    """Return all examples of one class, or a uniformly random part of them.

    Args:
        labels: Class of each example, shape ``(n,)``.
        label: The class to forget.
        size: Number of examples in the set; None for all of the class.
        generator: Source of randomness; needed if ``size`` is given.

    Returns:
        Sorted int64 indices of examples of that class.

    Raises:
        ValueError: If no example has the label, every example has it and no size is
            given, the size is out of range, or a generator is missing.
    """
    labels = _flat("labels", labels)
    members = np.flatnonzero(labels == label).astype(np.int64)
    expect(
        members.size > 0,
        "label",
        label,
        "must be the label of an example",
        f"The labels are {np.unique(labels)}.",
    )
    if size is None:
        expect(
            members.size < labels.size,
            "label",
            label,
            "must leave at least one example in the retain set",
            "Every example has this label: pass a size.",
        )
        return members
    largest = min(members.size, labels.size - 1)
    why = (
        f"the number of examples with label {label}, less one if every example has "
        "this label"
    )
    _check_size(size, largest, why)
    expect(
        generator is not None,
        "generator",
        generator,
        "must be a numpy Generator",
        "Pass numpy.random.default_rng(seed), which chooses a part of the class.",
    )
    return np.sort(_draw(members, size, cast(np.random.Generator, generator)))


def retain_indices(num_examples: int, forget_indices: ArrayLike) -> Indices:
    """Return the examples that remain: every index that is not to be forgotten.

    Args:
        num_examples: Number of training examples ``n``.
        forget_indices: Positions to forget, shape ``(m,)``, each once.

    Returns:
        Sorted int64 ``(n - m,)``.

    Raises:
        ValueError: If the forget set is empty, has duplicates, leaves ``[0, n)``, or
            is the whole training set.
    """
    forget = distinct_indices("forget_indices", forget_indices, num_examples)
    expect(
        forget.size < num_examples,
        "forget_indices",
        f"all {num_examples} examples",
        "must leave at least one example in the retain set",
        "To forget all examples, delete the model.",
    )
    return np.setdiff1d(np.arange(num_examples, dtype=np.int64), forget, True)


def _warn_of_cuts(scores: ArrayLike, chosen: Mapping[str, Indices]) -> None:
    """Warn if a set contains only some of the examples with equal scores.

    Args:
        scores: Difficulty of each example.
        chosen: The sets by name.

    Warns:
        UserWarning: Shown at the line that chose the size, outside this module.
    """
    levels = ties(scores)
    totals = np.bincount(levels)
    cuts = []
    for name, indices in chosen.items():
        inside = np.bincount(levels[indices], minlength=len(totals))
        for level in np.flatnonzero((0 < inside) & (inside < totals)):
            cuts.append(f"{inside[level]} of {totals[level]} in {name!r}")
    if cuts:
        warnings.warn(_CUT.format(cuts=", ".join(cuts)), stacklevel=3)


def _numbers(scores: ArrayLike) -> NDArray[np.float64]:
    """Return scores as float64 ``(n,)`` without NaN."""
    values = _flat("scores", scores).astype(np.float64)
    bad = np.flatnonzero(np.isnan(values))
    expect(
        bad.size == 0,
        "scores",
        f"NaN at {bad[:3].tolist()}",
        "must be a number for every example",
        "Fill the missing observations with opacus_pi.ledger.filled_by_rank(ledger), "
        "or compute those scores again.",
    )
    return values


def _flat(name: str, values: ArrayLike) -> NDArray[Any]:
    """Return one value per example as a flat non-empty array."""
    array = np.asarray(values)
    expect(
        array.ndim == 1 and array.size > 0,
        name,
        f"an array of shape {array.shape}",
        "must have one value per example, shape (n,)",
        "Flatten it or average over the other axes first.",
    )
    return array


def _check_size(size: int, largest: int, why: str) -> None:
    """Raise unless a set of this size exists.

    Args:
        size: The size, a whole number.
        largest: The largest possible size.
        why: Where this limit comes from, for the message.

    Raises:
        ValueError: If the size is not a whole number from 1 to ``largest``.
    """
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    expect(
        whole and 1 <= size <= largest,
        "size",
        size,
        f"must be a whole number in [1, {largest}]",
        f"The upper limit is {why}.",
    )


def _draw(members: Indices, size: int, generator: np.random.Generator) -> Indices:
    """Return a uniformly random choice without replacement from some examples."""
    return generator.choice(members, size=size, replace=False)
