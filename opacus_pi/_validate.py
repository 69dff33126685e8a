"""Checks of arguments, with one message format: what is wrong, what was got, what to do.

>>> in_range(
...     0, 1, remedy="Divide the batch size by the data set size.", sample_rate=1.2
... )
Traceback (most recent call last):
    ...
ValueError: sample_rate must be in [0, 1], got 1.2. Divide the batch size by the data set size.
"""  # noqa: E501

import math
import sys
from collections.abc import Mapping, Set
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._printable import printable
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


def require(condition: bool, problem: str, remedy: str) -> None:
    """Raise ``ValueError`` unless a condition holds that is not about one argument.

    Args:
        condition: The condition that must hold.
        problem: What is wrong, as a full sentence with the values that were got.
        remedy: One sentence: what the caller can do.

    Raises:
        ValueError: If ``condition`` is false.
    """
    if not condition:
        raise ValueError(f"{printable(problem)} {remedy}")


def _short(value: Any) -> str:
    """Return a value's text as one line of at most 80 characters.

    A longer text is cut in the middle, because the end of a path is the file's name.
    """
    text = printable(" ".join(str(value).split()) or repr(value))
    return text if len(text) <= 80 else f"{text[:38]}...{text[-39:]}"


def numbers(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return real numbers as float64; refuse other values that NumPy would convert.

    NumPy drops the mask of a masked array and the imaginary part of complex numbers,
    and reads the text "1" and the flag True as the number 1.

    Args:
        name: The argument's name.
        value: A number or an array of any shape.

    Returns:
        float64 in the shape of the value; not a copy if it is such an array already.

    Raises:
        ValueError: If it is masked, or holds anything but real numbers that float64 can
            represent.
    """
    return real_array(name, value).astype(np.float64, copy=False)


def one_number(*, remedy: str, **named: ArrayLike) -> None:
    """Check that every named value is a single real number, of any size.

    Args:
        remedy: One sentence: what the caller can do.
        **named: The arguments to check, by their public names.

    Raises:
        ValueError: If one is an array, a list, a text, a flag or None.
    """
    for name, value in named.items():
        array = numbers(name, value)
        expect(array.ndim == 0, name, repr(value), "must be one number", remedy)


def real_array(name: str, value: ArrayLike) -> NDArray[Any]:
    """Return a value as an array of its own type, or refuse what is no real number.

    Args:
        name: The argument's name.
        value: A number or an array of any shape.

    Raises:
        ValueError: As ``numbers``.
    """
    expect(
        not isinstance(value, np.ma.MaskedArray),
        name,
        "a masked array",
        "must be a number or a plain array",
        "Select the entries that count, or put NaN where nothing is known.",
    )
    array = np.asarray(value)
    is_real = array.dtype.kind in "iuf" or array.size == 0
    if array.dtype.kind == "O":
        is_real = all(map(_is_real, array.ravel().tolist()))
    expect(
        is_real,
        name,
        "" if is_real else repr(_not_real(array)),
        "must hold real numbers only",
        "Convert other values to real numbers first, for example None to NaN.",
    )
    if array.dtype.kind != "O":
        return array
    try:
        return array.astype(np.float64)
    except OverflowError as error:
        raise ValueError(
            f"{name} must hold numbers that fit into a float64 ({error}). Pass smaller "
            "numbers."
        ) from error


def _not_real(array: NDArray[Any]) -> Any:
    """Return the first entry of an array that is not a real number."""
    entries = array.ravel().tolist()
    return next((one for one in entries if not _is_real(one)), entries[0])


def _is_real(value: object) -> bool:
    """Return whether a value is a real number; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


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
    requirement = _range_in_words(low, high, closed=closed)
    for name, value in named.items():
        array = numbers(name, value)
        if closed:
            ok = (array >= low) & (array <= high)
        else:
            ok = (array > low) & (array < high)
        expect(bool(ok.all()), name, _offender(array, ok), requirement, remedy)


def _range_in_words(low: float, high: float, *, closed: bool) -> str:
    """Return what a number of a range must be, such as ``"must be in [0, 1]"``."""
    bound = f"{'at least' if closed else 'above'} {low:g}"
    if high == math.inf:
        return f"must be {bound}" if closed else f"must be finite and {bound}"
    if high == sys.float_info.max:
        return f"must be finite and {bound}" if low > -high else "must be finite"
    brackets = "[]" if closed else "()"
    return f"must be in {brackets[0]}{low:g}, {high:g}{brackets[1]}"


def positive(*, remedy: str, **named: ArrayLike) -> None:
    """Check that every named number (or array) is above 0; infinity is allowed.

    Raises:
        ValueError: If an entry is 0, negative or not a number.
    """
    for name, value in named.items():
        array = numbers(name, value)
        ok = array > 0
        expect(bool(ok.all()), name, _offender(array, ok), "must be above 0", remedy)


def _offender(numbers: NDArray[Any], ok: NDArray[Any]) -> float:
    """Return the first entry that fails a check; NaN if all pass."""
    return float(numbers[~ok][0]) if not ok.all() else float("nan")


def _wide_integers(values: ArrayLike) -> NDArray[Any]:
    """Return values as an array; whole numbers beyond int64 as objects, not rounded.

    Args:
        values: A list of whole numbers, or anything else that NumPy converts.
    """
    array = np.asarray(values)
    if array.dtype.kind != "f" or not isinstance(values, list | tuple):
        return array
    exact = np.array(values, dtype=object)
    return exact if _are_python_integers(exact) else array


def _are_python_integers(array: NDArray[Any]) -> bool:
    """Return whether an array holds whole numbers of Python, as objects."""
    return array.dtype.kind == "O" and all(type(x) is int for x in array.ravel())


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
    expect(
        not isinstance(values, np.ma.MaskedArray),
        name,
        "a masked array",
        "must be a flat list of whole numbers",
        "Select the entries that count (values.compressed()).",
    )
    _refuse_names(name, values)
    array = _wide_integers(values)
    if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
        expect(False, name, array, "must be a flat list", f"Write [{array}].")
    expect(
        array.size > 0,
        name,
        "[]",
        "must contain an example",
        "Pass at least one index.",
    )
    whole = array.ndim == 1 and (
        np.issubdtype(array.dtype, np.integer) or _are_python_integers(array)
    )
    expect(
        whole,
        name,
        f"{array.dtype} of shape {array.shape}",
        "must be a flat list of whole numbers",
        "Convert a mask with numpy.flatnonzero, other numbers with astype(int).",
    )
    inside = (array >= 0) & (array < size)
    expect(
        bool(inside.all()),
        name,
        array[~inside][0] if not inside.all() else None,
        f"must be in [0, {size})",
        "Pass positions in the training set.",
    )
    ordered, counts = np.unique(array.astype(np.int64), return_counts=True)
    repeated = ordered[counts > 1]
    expect(
        repeated.size == 0,
        name,
        f"{repeated[0]} more than once" if repeated.size else "",
        "must not have duplicates",
        "Pass each example once (numpy.unique).",
    )
    return ordered


def _refuse_names(name: str, values: object) -> None:
    """Refuse names of persons, and tables by person, where positions are wanted.

    Args:
        name: The argument's name.
        values: What was passed.

    Raises:
        ValueError: If it is a text, a mapping or a set, or has a text as an entry.
    """
    wanted = "must be a list of positions in the training set, counted from 0"
    if isinstance(values, Mapping | Set):
        is_set = isinstance(values, Set)
        expect(
            False,
            name,
            f"a {type(values).__name__}",
            wanted,
            "Pass sorted(...) of a set." if is_set else "Pass the list of one person.",
        )
    array = np.asarray(values)
    if array.dtype.kind not in "UO":
        return
    texts = [x for x in array.ravel().tolist() if isinstance(x, str)]
    texts.sort(key=str.isdecimal)  # a list with a name turns its numbers into texts
    if not texts:
        return
    expect(
        False,
        name,
        repr(texts[0]),
        wanted,
        f"Convert text to whole numbers, as in [{texts[0]}]."
        if texts[0].isdecimal()
        else "A person is named by all positions of the person's examples: look them "
        f"up in your table of owners, such as owners[{printable(texts[0])!r}].",
    )
