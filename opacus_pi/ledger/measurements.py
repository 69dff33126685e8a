"""Arrays of measurements: checked when they come in, filled where nothing was seen.

>>> fill_unobserved([[np.nan, 1], [2, np.nan]])
array([[2., 1.],
       [2., 1.]])
"""

import re

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect
from opacus_pi.ledger.mechanism import frozen

CHANGED = "changed"
FOR_RANKING = "for ranking"  # what a file says of its norms
_NAME = re.compile(f"sha256:[0-9a-f]{{64}}|{CHANGED}", re.ASCII)


def fill_unobserved(rows: ArrayLike) -> NDArray[np.float64]:
    """Fill each example's gaps: its next observation, else its last, else infinity.

    Infinity stands for "the clip norm": no gradient enters an update larger than that.
    So an example that was not seen never counts as harmless.

    Args:
        rows: ``(N, n)``, NaN where not observed.

    Returns:
        float64 ``(N, n)`` without NaN.
    """
    filled = np.array(rows, dtype=np.float64)
    if not np.isnan(filled).any():
        return filled
    for backwards in (True, False):
        order = range(len(filled) - 2, -1, -1) if backwards else range(1, len(filled))
        for i in order:
            neighbour = filled[i + 1 if backwards else i - 1]
            np.copyto(filled[i], neighbour, where=np.isnan(filled[i]))
    return np.where(np.isnan(filled), np.inf, filled)


def checked_steps(value: ArrayLike, num_steps: int) -> NDArray[np.int64]:
    """Row positions, checked to be increasing whole numbers within the run."""
    steps = np.array(value)
    whole = steps.ndim == 1 and (steps.size == 0 or steps.dtype.kind in "iu")
    inside = whole and bool(((steps >= 0) & (steps <= num_steps)).all())
    expect(
        inside and bool((np.diff(steps.astype(np.int64)) > 0).all()),
        "steps",
        steps.tolist(),
        f"must be strictly increasing whole numbers in [0, {num_steps}]",
        "Count the updates done when each row was measured.",
    )
    return frozen(steps.astype(np.int64))


def checked_weights(value: str | None) -> str | None:
    """The name of a model's weights, or what is known instead."""
    expect(
        value is None or (isinstance(value, str) and bool(_NAME.fullmatch(value))),
        "weights",
        repr(value),
        f"must be 'sha256:' and 64 hexadecimal digits, {CHANGED!r} or None",
        "Leave it to the engine: it knows the model.",
    )
    return value


def is_for_ranking(norms: str | None) -> bool:
    """Whether a file's norms only rank examples; None where it says nothing of them."""
    expect(
        norms in (None, FOR_RANKING),
        "the file's norms",
        repr(norms),
        f"must be {FOR_RANKING!r}, if anything",
        "Restore the file from a copy.",
    )
    return norms is not None


def checked_measurements(
    name: str, value: ArrayLike, num_rows: int
) -> NDArray[np.float32]:
    """Checked measurements, NaN where there is none."""
    with np.errstate(over="ignore"):
        array = np.array(value, dtype=np.float32)
    expect(
        array.ndim == 2 and len(array) == num_rows,
        name,
        f"an array of shape {array.shape}",
        f"must have shape (N, n) with N = {num_rows}, the number of steps",
        "Rows are the steps, columns the examples.",
    )
    bad = (array < 0) | np.isinf(array)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        expect(
            False,
            name,
            f"{array[row, column]} (row {row}, example {column})",
            "must be finite and at least 0 (NaN: not observed)",
            "An exploded gradient has no finite loss: clip it, or drop the example.",
        )
    return frozen(array)


def checked_ids(value: ArrayLike) -> NDArray[np.int64]:
    """Checked example numbers, in the caller's order."""
    limit = np.iinfo(np.int64).max
    if np.size(value):
        distinct_indices("example_ids", value, limit)
    return frozen(np.array(value, dtype=np.int64))
