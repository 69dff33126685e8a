"""The examples that a request is about: positions, or those of a user."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, require
from opacus_pi.unlearning.entry_checks import plain_name


def requested_rows(
    indices: ArrayLike | None,
    user: str | int | None,
    rows_of: Mapping[Any, ArrayLike],
    size: int,
) -> NDArray[np.int64]:
    """Return the examples that a request is about, sorted and checked.

    Args:
        indices: Positions in the training set; None: all of the user's.
        user: The user whose examples they are; None: of no known user.
        rows_of: Each user's positions.
        size: Length of the training set.

    Raises:
        ValueError: If neither is given, the indices are bad or not the user's, or the
            user is unknown.
    """
    require(
        indices is not None or user is not None,
        "indices or user must be given, got neither.",
        "Pass indices, or a user of rows_of.",
    )
    chosen = indices
    if user is not None:
        own = _rows_of_user(plain_name("user", user), rows_of)
        chosen = own if indices is None else indices
    rows = distinct_indices("indices", cast(ArrayLike, chosen), size)
    if user is not None and indices is not None:
        others = np.setdiff1d(rows, np.asarray(own))
        expect(
            not len(others),
            "indices",
            others[:5].tolist(),
            f"must be examples of the user {user!r} in rows_of",
            "Pass some of the user's examples, or leave out user.",
        )
    return rows


def _rows_of_user(name: str, rows_of: Mapping[Any, ArrayLike]) -> ArrayLike:
    """Return the examples of a user, whose key may be a number or its digits.

    Args:
        name: The user.
        rows_of: Each user's positions.
    """
    keys: list[Any] = [name]
    if name.lstrip("-").isdecimal() and str(int(name)) == name:
        keys.append(int(name))
    known = [key for key in keys if key in rows_of]
    expect(
        len(known) == 1,
        "user",
        name,
        f"must be one of the {len(rows_of)} users of rows_of",
        "rows_of has this user twice, as a number and as a text: keep one."
        if known
        else "Add the user's examples to rows_of; positions are passed as indices.",
    )
    return rows_of[known[0]]
