"""Pictures of examples: Figure 9."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect


def plot_pictures(
    rows: Mapping[str, ArrayLike],
    titles: Mapping[str, Sequence[str]] | None = None,
) -> NDArray[np.object_]:
    """Plot rows of pictures, e.g. examples that are easy or hard to forget.

    Args:
        rows: Pictures of each row, with values in [0, 1], ``(m, h, w)`` or
            ``(m, c, h, w)`` with one or three channels; m is the same for all rows.
        titles: Texts above the pictures of each row, e.g. labels and losses.

    Returns:
        The Axes, an array ``(rows, m)``.

    Raises:
        ValueError: If rows differ in length, or an array does not hold pictures.

    Source: paper, Figure 9.
    """
    pictures = {name: _pictures(name, values) for name, values in rows.items()}
    lengths = {len(found) for found in pictures.values()}
    expect(
        len(lengths) == 1,
        "rows",
        f"rows of {sorted(lengths)} pictures",
        "must have rows of the same length",
        "Pass equally many pictures in every row.",
    )
    shape, titles = (len(pictures), lengths.pop()), titles or {}
    size = (1.3 * shape[1] + 0.6, 1.45 * shape[0])
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.subplots(*shape, squeeze=False)
    for line, (name, found) in zip(grid, pictures.items(), strict=True):
        texts = titles.get(name, [""] * len(found))
        for ax, picture, text in zip(line, found, texts, strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_title(text, fontsize="small")
        line[0].set_ylabel(name)
    return grid


def _pictures(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return pictures as matplotlib expects them, ``(m, h, w)`` or ``(m, h, w, 3)``.

    Torch has channels before height and width, matplotlib after them.

    Args:
        name: Name of the row, for the message.
        values: The pictures of one row.

    Raises:
        ValueError: If the array has another shape or is empty.
    """
    array = np.asarray(values, dtype=np.float64)
    good = array.ndim == 3 or (array.ndim == 4 and array.shape[1] in (1, 3))
    expect(
        good and array.size > 0,
        f"rows[{name!r}]",
        f"an array of shape {array.shape}",
        "must have shape (m, h, w) or (m, c, h, w) with c = 1 or 3",
        "Put the channels before height and width.",
    )
    if array.ndim == 3:
        return array
    return array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)
