"""Compare changed samples with what they, and the other samples, were before.

A transform may change every sample, so that none is recognised. ``made_of_others``
compares the entries of all samples before and after it. It finds the two changes by
which the order of a batch is lost most often: mixtures of two samples (mixup, cutmix),
and samples that were moved and scaled.

*Guarantee.* A sample that is reported as mixed or moved equals, up to rounding, a
mixture with or a copy of another sample, and is not explained by its own old values. A
copy of another sample is not reported as a mixture. ``are_near_own`` finds samples of
which only a part was changed, or all a little.

*What breaks it.* Other changes look like an augmentation of each sample on its own.
With fewer than four entries in a sample, or more than 128 samples in a batch, nothing
is detected.

>>> import numpy as np
>>> before = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
>>> made_of_others(0.7 * before + 0.3 * np.roll(before, 1, 0), before).mixed
array([ True,  True,  True,  True])
>>> made_of_others(2 * before[[1, 0, 2, 3]] + 1, before).moved
array([ True,  True, False, False])
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["OtherSamples", "are_near_own", "made_of_others", "num_mixed"]

Entries = NDArray[np.float32]
Mask = NDArray[np.bool_]
_CLOSE = 1e-4  # of a sample's length: what is closer than this is equal to it
_MIN_ENTRIES = 4  # with fewer, every sample is a sum of two others
_MAX_COMPARED = 128  # samples that are compared with all others
_NEAR = 0.5  # of the distance to the nearest other sample
_MAX_NEAR = 32  # samples of which the distances to all others are computed


class OtherSamples(NamedTuple):
    """Masks of the samples that are made of others, each bool ``(b,)``.

    Attributes:
        mixed: Made of their own and one other sample.
        moved: Another sample, scaled and shifted, and not their own.
    """

    mixed: Mask
    moved: Mask


def made_of_others(now: Entries, before: Entries) -> OtherSamples:
    """Find the samples that are made of other samples than their own.

    Args:
        now: Entries of each sample after the change, ``(b, k)``.
        before: The same entries before it.
    """
    if not _are_comparable(now, before):
        none = np.zeros(len(now), dtype=np.bool_)
        return OtherSamples(none, none)
    scaled = _are_scaled(now, before)
    is_own = scaled.diagonal()
    is_copy = scaled.any(axis=1)
    is_sum = _are_sums(now, before, before)
    np.fill_diagonal(is_sum, False)
    is_spliced = _are_spliced(now, before, before)
    mixed = (is_sum.any(axis=1) | is_spliced) & ~is_copy
    return OtherSamples(mixed, is_copy & ~is_own)


def are_near_own(now: Entries, before: Entries, rows: NDArray[np.int64]) -> bool:
    """Return whether most of some samples are much nearer to their own old values.

    Of the distance to the nearest other sample it is at most a half, either in the
    number of entries that differ, as after a masking, or in their size, as after small
    noise. Samples that were made independently of the batch are not.

    Args:
        now: Entries of each sample after a change, ``(b, k)``.
        before: The same entries before it.
        rows: int64 ``(n,)``: the samples that were changed; some of many are compared.
    """
    if now.shape != before.shape or now.shape[1] < _MIN_ENTRIES or len(now) < 2:
        return False
    rows = rows[:: -(-len(rows) // _MAX_NEAR)]
    num_near = 0
    for row in rows.tolist():
        with np.errstate(all="ignore"):  # infinite entries
            changes = np.abs(before - now[row])
        for distances in (np.count_nonzero(changes, axis=1), changes.sum(axis=1)):
            if distances[row] <= _NEAR * np.delete(distances, row).min():
                num_near += 1
                break
    return 2 * num_near > len(rows)


def num_mixed(
    now: Entries, own: Entries, others: Entries, without: NDArray[np.int64] | None
) -> int:
    """Count samples that are mixtures of their own and another one, at most 128.

    Args:
        now: Entries of each sample after a change, ``(b, k)``.
        own: The same entries of its own sample before it, ``(b, k)``.
        others: Entries of the samples that may be mixed in, ``(n, k)``; the first 128
            are compared.
        without: Which of these is each sample's own one, ``(b,)``; None: no one is.
    """
    now, own, others = now[:_MAX_COMPARED], own[:_MAX_COMPARED], others[:_MAX_COMPARED]
    if now.shape[1] < _MIN_ENTRIES:
        return 0
    is_sum = _are_sums(now, own, others)
    if without is not None:
        without = without[:_MAX_COMPARED]
        (rows,) = (without < len(others)).nonzero()
        is_sum[rows, without[rows]] = False
    is_own = _are_scaled(now, own).diagonal()
    mixed = (is_sum.any(axis=1) | _are_spliced(now, own, others)) & ~is_own
    return int(np.count_nonzero(mixed))


def _are_comparable(now: Entries, before: Entries) -> bool:
    """Return whether there are enough entries, and not too many samples."""
    return (
        now.shape == before.shape
        and len(now) <= _MAX_COMPARED
        and now.shape[1] >= _MIN_ENTRIES
    )


def _are_scaled(now: Entries, before: Entries) -> Mask:
    """Find pairs: sample i is a multiple of sample j plus a constant, ``(b, b)``."""
    y, x = now.astype(np.float64), before.astype(np.float64)
    with np.errstate(all="ignore"):  # constant samples, infinite entries
        y, x = y - y.mean(axis=1, keepdims=True), x - x.mean(axis=1, keepdims=True)
        lengths = (y * y).sum(axis=1)[:, None] * (x * x).sum(axis=1)
        scaled: Mask = (y @ x.T) ** 2 >= (1 - _CLOSE**2) * lengths
        scaled &= lengths > 0
    return scaled


def _are_sums(now: Entries, own: Entries, others: Entries) -> Mask:
    """Find pairs ``(b, n)``: a sample is a multiple of its own one plus one of another.

    For each pair the two factors follow from least squares, which needs only scalar
    products.
    """
    y, o, x = (part.astype(np.float64) for part in (now, own, others))
    with np.errstate(all="ignore"):  # equal samples, zeros, infinite entries
        squares, own_squares = (x * x).sum(axis=1), (o * o).sum(axis=1)[:, None]
        products, with_all = o @ x.T, y @ x.T
        with_own = (y * o).sum(axis=1)[:, None]
        lengths = (y * y).sum(axis=1)[:, None]
        determinant = own_squares * squares - products**2
        of_own = (with_own * squares - with_all * products) / determinant
        of_other = (with_all * own_squares - with_own * products) / determinant
        rest = lengths - of_own * with_own - of_other * with_all
        is_sum: Mask = (rest <= _CLOSE**2 * lengths) & (determinant > 0)
    return is_sum


def _are_spliced(now: Entries, own: Entries, others: Entries) -> Mask:
    """Find samples with some of their own entries and the rest of another sample.

    Entries that all have one value may have been erased, and are not counted.
    """
    is_other = now != own
    num_other = is_other.sum(axis=1)
    spliced = np.zeros(len(now), dtype=np.bool_)
    for i in np.flatnonzero((num_other > 1) & (num_other < now.shape[1])):
        rest = now[i, is_other[i]]
        if (rest != rest[0]).any():
            spliced[i] = (others[:, is_other[i]] == rest).all(axis=1).any()
    return spliced
