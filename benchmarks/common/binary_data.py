"""Two-class data for the certified benchmark: rows of norm 1, labels ±1."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Array = NDArray[np.float64]
_NUMERIC = (0, 2, 4, 10, 11, 12)  # numeric columns of Adult; the others are categories


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
    parts = train_test_split(
        images[chosen],
        np.where(labels[chosen] == 8, 1.0, -1.0),
        test_size=71,
        stratify=labels[chosen],
        random_state=0,
    )
    x_train, x_test, y_train, y_test = parts
    centre = x_train.mean(axis=0)
    return _on_sphere("digits 3/8", x_train - centre, y_train, x_test - centre, y_test)


def adult(data_root: Path) -> BinaryData:
    """Return UCI Adult (32,561 + 16,281 rows): is the income above 50,000 dollars?

    Args:
        data_root: Folder with ``adult.data`` and ``adult.test``, gzipped or not.
    """
    train, test = (_rows(data_root, name) for name in ("adult.data", "adult.test"))
    features = []
    for part in (train, test):
        columns = [_encoded(train[:, j], part[:, j], j in _NUMERIC) for j in range(14)]
        features.append(np.concatenate(columns, axis=1))
    labels = [
        np.where(np.char.startswith(part[:, -1], ">"), 1.0, -1.0)
        for part in (train, test)
    ]
    return _on_sphere("Adult", features[0], labels[0], features[1], labels[1])


def _rows(data_root: Path, name: str) -> NDArray[np.str_]:
    """Return the rows of a file that have 15 fields."""
    path = data_root / name
    opener = open if path.exists() else gzip.open
    path = path if path.exists() else data_root / f"{name}.gz"
    with opener(path, "rt", encoding="ascii") as file:
        rows = [line.strip().split(", ") for line in file]
    return np.array([row for row in rows if len(row) == 15])


def _encoded(train: NDArray, values: NDArray, numeric: bool) -> Array:
    """Return a column standardised by the training rows, or as one 0/1 per category."""
    if numeric:
        known = train.astype(float)
        return ((values.astype(float) - known.mean()) / known.std())[:, None]
    return (values[:, None] == np.unique(train)).astype(float)


def _on_sphere(
    name: str, x_train: Array, y_train: Array, x_test: Array, y_test: Array
) -> BinaryData:
    """Add an intercept and scale every row to norm 1."""
    weight = np.abs(x_train).mean()
    rows = []
    for x in (x_train, x_test):
        whole = np.concatenate([x, np.full((len(x), 1), weight)], axis=1)
        rows.append(whole / np.linalg.norm(whole, axis=1, keepdims=True))
    return BinaryData(name, (rows[0], y_train), (rows[1], y_test))
