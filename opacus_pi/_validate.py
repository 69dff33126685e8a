"""Checks of arguments, with one message format: what is wrong, what was got, what to do.

>>> in_range(
...     0, 1, remedy="Divide the batch size by the data set size.", sample_rate=1.2
... )
Traceback (most recent call last):
    ...
ValueError: sample_rate must be in [0, 1], got 1.2. Divide the batch size by the data set size.
"""  # noqa: E501

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike


def expect(
    condition: bool, name: str, value: Any, requirement: str, remedy: str
) -> None:
    """Raise ``ValueError`` in the common format unless a condition holds.

    Args:
        condition: The condition that must hold.
        name: The argument's name.
        value: The value that was got, or words for it.
        requirement: What follows the name in the message, e.g. ``"must be in (0, 1)"``.
        remedy: One sentence: what the caller can do.

    Raises:
        ValueError: If ``condition`` is false.
    """
    if not condition:
        raise ValueError(f"{name} {requirement}, got {_short(value)}. {remedy}")


def _short(value: Any) -> str:
    """Return a value's text as one line of at most 80 characters."""
    text = " ".join(str(value).split()) or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def in_range(
    low: float, high: float, *, remedy: str, closed: bool = True, **named: ArrayLike
) -> None:
    """Check that every named number (or array, entry by entry) lies in a range.

    Args:
        low: Lower end.
        high: Upper end.
        remedy: One sentence: what the caller can do.
        closed: Whether the ends belong to the range.
        **named: The arguments to check, by their public names.

    Raises:
        ValueError: If an entry is outside, or is not a number.
    """
    brackets = "[]" if closed else "()"
    requirement = f"must be in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
    for name, value in named.items():
        numbers = np.asarray(value, dtype=np.float64)
        if closed:
            ok = (numbers >= low) & (numbers <= high)
        else:
            ok = (numbers > low) & (numbers < high)
        expect(bool(ok.all()), name, _offender(numbers, ok), requirement, remedy)


def positive(*, remedy: str, **named: ArrayLike) -> None:
    """Check that every named number (or array) is above 0; infinity is allowed.

    Raises:
        ValueError: If an entry is 0, negative or not a number.
    """
    for name, value in named.items():
        numbers = np.asarray(value, dtype=np.float64)
        ok = numbers > 0
        expect(bool(ok.all()), name, _offender(numbers, ok), "must be above 0", remedy)


def _offender(numbers: NDArray[Any], ok: NDArray[Any]) -> float:
    """Return the first entry that fails a check; NaN if all pass."""
    return float(numbers[~ok][0]) if not ok.all() else float("nan")


def distinct_indices(name: str, values: ArrayLike, size: int) -> NDArray[np.int64]:
    """Check a selection of examples and return it sorted.

    Args:
        name: The argument's name.
        values: Whole numbers, shape ``(m,)``, each once and in ``[0, size)``.
        size: Number of examples to choose from.

    Returns:
        int64 ``(m,)``, increasing.

    Raises:
        ValueError: If the selection is empty, not whole numbers, has duplicates, or
            leaves the range.
    """
    array = np.asarray(values)
    if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
        expect(False, name, array, "must be a flat list", f"Write [{array}].")
    expect(
        array.size > 0, name, "[]", "must name an example", "Pass at least one index."
    )
    whole = array.ndim == 1 and (
        np.issubdtype(array.dtype, np.integer)
        and not np.issubdtype(array.dtype, np.bool_)
    )
    expect(
        whole,
        name,
        f"{array.dtype}{list(array.shape)}",
        "must be a flat list of whole numbers",
        "Convert a mask with numpy.flatnonzero.",
    )
    inside = (array >= 0) & (array < size)
    expect(
        bool(inside.all()),
        name,
        array[~inside][0] if not inside.all() else None,
        f"must be in [0, {size})",
        "Indices are positions in the training set.",
    )
    ordered, counts = np.unique(array.astype(np.int64), return_counts=True)
    expect(
        bool((counts == 1).all()),
        name,
        ordered[counts > 1][:1],
        "must not have duplicates",
        "Name each example once (numpy.unique).",
    )
    return ordered
