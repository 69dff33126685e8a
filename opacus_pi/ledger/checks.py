"""Checks of the fields of a ledger, each with an error that names the field.

A ledger checks its fields when it is created, so that every function that takes one may
rely on them. The checked arrays are read-only copies: a ledger cannot change.

>>> checked_steps([1, 3, 2], num_steps=3)
Traceback (most recent call last):
    ...
ValueError: steps must be strictly increasing whole numbers in [0, 3], got [1, 3, 2]. For each row, pass the number of updates done before it was measured.
"""  # noqa: E501

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, real_array
from opacus_pi.ledger.custody import Custody

CHANGED = "changed"  # in place of a name: the weights were written to after the run
_NAME = re.compile(f"sha256:[0-9a-f]{{64}}|{CHANGED}", re.ASCII)


def checked_steps(value: ArrayLike, num_steps: int) -> NDArray[np.int64]:
    """Return the update counts of the rows, checked.

    Args:
        value: ``(N,)``, strictly increasing whole numbers in [0, ``num_steps``].
        num_steps: Number of updates of the run.

    Returns:
        int64 ``(N,)``, read-only.

    Raises:
        ValueError: If the counts do not increase or leave the run.
    """
    steps = np.array(real_array("steps", value))
    whole = steps.ndim == 1 and (steps.size == 0 or steps.dtype.kind in "iu")
    inside = whole and bool(((steps >= 0) & (steps <= num_steps)).all())
    expect(
        inside and bool((np.diff(steps.astype(np.int64)) > 0).all()),
        "steps",
        steps.tolist(),
        f"must be strictly increasing whole numbers in [0, {num_steps}]",
        "For each row, pass the number of updates done before it was measured.",
    )
    return frozen(steps.astype(np.int64))


def checked_weights(value: str | None) -> str | None:
    """Return the name of a model's weights, checked.

    Args:
        value: ``"sha256:"`` and 64 hexadecimal digits, ``"changed"``, or None.

    Raises:
        ValueError: If it is anything else.
    """
    expect(
        value is None or (isinstance(value, str) and bool(_NAME.fullmatch(value))),
        "weights",
        repr(value),
        f"must be 'sha256:' and 64 hexadecimal digits, {CHANGED!r} or None",
        "Omit this argument: the engine sets it.",
    )
    return value


def checked_measurements(
    name: str, value: ArrayLike, num_rows: int
) -> NDArray[np.float32]:
    """Return the measurements of each example at each row, checked.

    Args:
        name: The field's name, for the error.
        value: ``(N, n)``, finite and at least 0; NaN where nothing was observed.
        num_rows: Number of rows, N.

    Returns:
        float32 ``(N, n)``, read-only.

    Raises:
        ValueError: If the shape is wrong, or an entry is negative or infinite.
    """
    if name == "correct" and np.asarray(value).dtype == np.bool_:  # flags by nature
        value = np.asarray(value, dtype=np.float32)
    array = _float32_copy(name, value)
    expect(
        array.ndim == 2 and len(array) == num_rows,
        name,
        f"an array of shape {array.shape}",
        f"must have shape (N, n) with N = {num_rows}, the number of steps",
        "Pass one row for each step and one column for each example.",
    )
    for number, row in enumerate(array):  # row by row, to spare memory
        bad = np.flatnonzero((row < 0) | np.isinf(row))
        expect(
            not len(bad),
            name,
            f"{row[bad[0]]} (row {number}, example {bad[0]})" if len(bad) else None,
            "must be finite and at least 0 (NaN: not observed)",
            _remedy_of(name, row[bad[0]] if len(bad) else 0.0),
        )
    return frozen(array)


def _float32_copy(name: str, value: ArrayLike) -> NDArray[np.float32]:
    """Return a copy of an array in float32; a read-only one of its own is not copied.

    Args:
        name: The field's name, for the error.
        value: The array. One that is read-only and owns its data, such as that of
            another ledger or of a file, cannot be changed by others.
    """
    if (
        type(value) is np.ndarray
        and value.dtype == np.float32
        and value.flags.owndata
        and value.flags.c_contiguous
        and not value.flags.writeable
    ):
        return value
    with np.errstate(over="ignore"):
        return np.array(real_array(name, value), dtype=np.float32)


def _remedy_of(name: str, value: float) -> str:
    """Return what to do about a measurement that is negative or infinite."""
    if name == "grad_norms" and value == np.inf:
        return (
            "The training diverged, or an item of the data set has infinite or NaN "
            "values: correct the item, or train again with a lower learning rate."
        )
    return "Pass NaN for a value that was not measured."


def checked_custody(value: Custody | None) -> Custody | None:
    """Return a chain of custody, checked.

    Args:
        value: The chain, or None.

    Raises:
        ValueError: If it is anything else.
    """
    expect(
        value is None or isinstance(value, Custody),
        "custody",
        repr(value),
        "must be a Custody or None",
        "Do not set it: the engine that records the run fills it in.",
    )
    return value


def checked_participations(
    value: ArrayLike, *, sampling: str, limit: int
) -> NDArray[np.int32]:
    """Return counts of the updates that each example was in, checked.

    Args:
        value: ``(N, n)``, whole numbers at least 0.
        sampling: ``"poisson"`` or ``"fixed"``: how the run drew its batches.
        limit: The largest count that an example can have over the run.

    Returns:
        int32 ``(N, n)``, read-only.

    Raises:
        ValueError: If sampling is not fixed, a count is not a whole number, or an
            example's counts add up to more than the limit.
    """
    counts = np.array(value)
    whole = counts.ndim == 2 and counts.dtype.kind in "iu"
    totals = counts.sum(axis=0, dtype=np.int64) if whole else np.empty(0)
    given = f"an array of shape {counts.shape} and type {counts.dtype}"
    expect(
        sampling == "fixed",
        "participations",
        given,
        f"must be None for sampling={sampling!r}",
        "Leave it out: under Poisson sampling the accounting uses the sample rate, "
        "not a count.",
    )
    expect(
        whole and bool((counts >= 0).all()),
        "participations",
        given,
        "must be whole numbers of shape (N, n), at least 0",
        "Count the updates that each example was in.",
    )
    expect(
        bool((totals <= limit).all()),
        "participations",
        totals.max(initial=0),
        f"must sum to at most {limit} for each example",
        "Count an example at most once in each update.",
    )
    return frozen(counts.astype(np.int32))


def checked_ids(value: ArrayLike) -> NDArray[np.int64]:
    """Return positions of examples in the data set, checked, in the caller's order.

    Args:
        value: ``(n,)``, whole numbers at least 0, each once.

    Returns:
        int64 ``(n,)``, read-only.

    Raises:
        ValueError: If a number is negative or occurs twice.
    """
    limit = np.iinfo(np.int64).max
    if np.size(value):
        distinct_indices("example_ids", value, limit)
    return frozen(np.array(value, dtype=np.int64))


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Make an array read-only, and return it.

    Args:
        array: An array without other users; changed in place.
    """
    array.setflags(write=False)
    return array
