"""Detect samples that were changed into mixtures or copies of other samples.

A transform may change every sample, so that none is recognised. ``made_of_others``
compares the entries of all samples before and after it. It finds the two changes by
which the order of a batch is lost most often: mixtures of two samples (mixup, cutmix),
and samples that were moved and scaled.

*Guarantee.* A sample that is reported as mixed or moved equals, up to rounding, a
mixture with or a copy of another sample, and is not explained by its own old values. A
copy of another sample is not reported as a mixture.

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

__all__ = ["OtherSamples", "made_of_others"]

Entries = NDArray[np.float32]
Mask = NDArray[np.bool_]
_CLOSE = 1e-4  # of a sample's length: what is closer than this is equal to it
_MIN_ENTRIES = 4  # with fewer, every sample is a sum of two others
_MAX_COMPARED = 128  # samples that are compared with all others


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
    mixed = (_are_sums(now, before) | _are_spliced(now, before)) & ~is_copy
    return OtherSamples(mixed, is_copy & ~is_own)


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


def _are_sums(now: Entries, before: Entries) -> Mask:
    """Find samples that are a multiple of themselves plus one of another sample.

    For each pair the two factors follow from least squares, which needs only scalar
    products.
    """
    y, x = now.astype(np.float64), before.astype(np.float64)
    with np.errstate(all="ignore"):  # equal samples, zeros, infinite entries
        squares, products = (x * x).sum(axis=1), x @ x.T
        with_own, with_all = (y * x).sum(axis=1)[:, None], y @ x.T
        lengths = (y * y).sum(axis=1)[:, None]
        determinant = squares[:, None] * squares - products**2
        own = (with_own * squares - with_all * products) / determinant
        other = (with_all * squares[:, None] - with_own * products) / determinant
        rest = lengths - own * with_own - other * with_all
        is_sum = (rest <= _CLOSE**2 * lengths) & (determinant > 0)
    np.fill_diagonal(is_sum, False)
    found: Mask = is_sum.any(axis=1)
    return found


def _are_spliced(now: Entries, before: Entries) -> Mask:
    """Find samples with some of their own entries and the rest of another sample.

    Entries that all have one value may have been erased, and are not counted.
    """
    is_other = now != before
    num_other = is_other.sum(axis=1)
    spliced = np.zeros(len(now), dtype=np.bool_)
    for i in np.flatnonzero((num_other > 1) & (num_other < now.shape[1])):
        rest = now[i, is_other[i]]
        if (rest != rest[0]).any():
            spliced[i] = (before[:, is_other[i]] == rest).all(axis=1).any()
    return spliced
