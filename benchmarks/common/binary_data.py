"""Two-class data for the certified benchmark: rows of norm 1, labels ±1.

Every row is encoded by a rule that looks at this row only, with constants from the
description of the data, never from the data. So removing a row changes no other one,
and a value out of range cannot move anything but its own row.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Array = NDArray[np.float64]
# Numeric columns of Adult: position, typical value, width; logarithmic if width is None
_NUMERIC = ((0, 40, 20), (2, 2e5, 1e5), (4, 10, 4), (12, 40, 15))
_AMOUNTS = (10, 11)  # capital gain and loss, in dollars
_CATEGORIES = (1, 3, 5, 6, 7, 8, 9, 13)


@dataclass(frozen=True)
class BinaryData:
    """Features ``(n, d)`` with an intercept column, rows of norm 1; labels ±1."""

    name: str
    train: tuple[Array, Array]
    test: tuple[Array, Array]


def digits_3_8() -> BinaryData:
    """Return handwritten 3 and 8 (357 images of 8×8), included in scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, (3, 8))
    x_train, x_test, y_train, y_test = train_test_split(
        images[chosen],
        np.where(labels[chosen] == 8, 1.0, -1.0),
        test_size=71,
        stratify=labels[chosen],
        random_state=0,
    )
    train, test = (encoded_digits(x) for x in (x_train, x_test))
    return BinaryData("digits 3/8", (train, y_train), (test, y_test))


def encoded_digits(images: Array) -> Array:
    """Return rows of norm 1 from images ``(n, 64)`` whose pixels go from 0 to 16."""
    return on_sphere(images / 8 - 1)


def adult(data_root: Path) -> BinaryData:
    """Return UCI Adult (32,561 + 16,281 rows): is the income above 50,000 dollars?

    Args:
        data_root: Folder with ``adult.data``, ``adult.test`` and ``adult.names``,
            gzipped or not.
    """
    categories = _documented(data_root)
    parts = []
    for name in ("adult.data", "adult.test"):
        rows = [line.split(", ") for line in _lines(data_root, name)]
        fields = np.array([row for row in rows if len(row) == 15])
        labels = np.where(np.char.startswith(fields[:, -1], ">"), 1.0, -1.0)
        parts.append((encoded_adult(fields, categories), labels))
    return BinaryData("Adult", *parts)


def encoded_adult(fields: NDArray[np.str_], categories: list[list[str]]) -> Array:
    """Return rows of norm 1 from texts ``(n, 15)``; unknown categories are all 0."""
    columns = [
        (fields[:, [j]].astype(float) - typical) / width
        for j, typical, width in _NUMERIC
    ]
    columns += [np.log1p(fields[:, [j]].astype(float)) / 10 for j in _AMOUNTS]
    columns += [
        (fields[:, [j]] == np.array(names)).astype(float)
        for j, names in zip(_CATEGORIES, categories, strict=True)
    ]
    return on_sphere(np.concatenate(columns, axis=1))


def on_sphere(rows: Array) -> Array:
    """Add an intercept to each row, and scale the row to norm 1, never above."""
    whole = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    return whole / (np.linalg.norm(whole, axis=1, keepdims=True) * (1 + 1e-12))


def _documented(data_root: Path) -> list[list[str]]:
    """Return each category column's values as the data's documentation lists them."""
    listed = [
        line.rstrip(".").split(": ")[1].split(", ")
        for line in _lines(data_root, "adult.names")
        if line[:1].isalpha() and ": " in line
    ]
    return [names for names in listed if names != ["continuous"]]


def _lines(data_root: Path, name: str) -> list[str]:
    """Return the lines of a file without the white space around them."""
    path = data_root / name
    opener = open if path.exists() else gzip.open
    path = path if path.exists() else data_root / f"{name}.gz"
    with opener(path, "rt", encoding="ascii") as file:
        return [line.strip() for line in file]
