"""Features of a frozen model, and the scaling of each feature vector to norm 1.

Heads are trained on features that a fixed model computes. The certificate of a head
covers the head only, so neither the model nor the scaling of its features may depend on
the training examples of the head. ``extract_features`` runs a model that you trained on
other data. ``unit_rows`` scales each feature vector by itself and not by the others.

>>> rows = unit_rows([[3.0, 4.0], [0.0, 0.0]], intercept=True)
>>> np.round(rows, 3).tolist()
[[0.424, 0.566, 0.707], [0.0, 0.0, 0.707]]
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, numbers, positive
from opacus_pi.models.batches import (
    batches_of,
    device_of,
    forward,
    inputs_and_targets,
    to_device,
)
from opacus_pi.models.collating import Collate
from opacus_pi.models.no_trace import evaluating
from opacus_pi.models.predictions import Data

ROUNDING = 1e-6  # norms up to 1 + this are taken for 1: float32 rounds to about 1e-7


def extract_features(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    collate_fn: Collate | None = None,
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Run a frozen model over all examples, leaving no trace.

    The model runs in evaluation mode without gradients, on the device of its
    parameters. It must not have been trained on the examples that the head may have to
    forget: no certificate of the head covers what the model has learned from them.

    Args:
        model: Returns one feature vector for each example; further axes are flattened.
            Cut the last layer off a classifier, for example
            ``torch.nn.Sequential(*model[:-1])``.
        data: A data set of ``(input, label)``, read in its own order, or any iterable
            of batches ``(inputs, labels)``, such as a loader. A loader that shuffles
            gives examples in its own order: then positions are not data-set indices.
        batch_size: Batch size for a data set; it does not change the result.
        collate_fn: Makes a batch of a list of items of a data set; torch's by default.

    Returns:
        Features, float64 ``(n, d)``, and labels, ``(n,)``, in the order of ``data``.

    Raises:
        ValueError: If there is no example, or an output is not a tensor with one row
            for each label.
    """
    loader = batches_of(data, batch_size, collate_fn)
    device, features, labels = device_of(model), [], []
    with evaluating(model):
        for batch in loader:
            x, y = to_device(inputs_and_targets(batch), device)
            outputs = forward(model, x)
            expect(
                isinstance(outputs, Tensor)
                and outputs.dim() > 1
                and len(outputs) == len(y),
                "model(inputs)",
                getattr(outputs, "shape", type(outputs).__name__),
                f"must be a tensor with one row for each of the {len(y)} labels",
                "Wrap the model so that it returns its features only.",
            )
            features.append(outputs.flatten(1).double().cpu().numpy())
            labels.append(y.cpu().numpy())
    expect(
        bool(features),
        "data",
        "[]",
        "must contain at least one example",
        "Pass a data set or loader that is not empty.",
    )
    return np.concatenate(features), np.concatenate(labels)


def unit_rows(
    features: ArrayLike, *, bound: float | None = None, intercept: bool = False
) -> NDArray[np.float64]:
    """Scale feature vectors to norm at most 1, each by itself.

    Args:
        features: ``(n, d)``.
        bound: A constant that was not computed from these vectors. They are divided by
            it, and then shortened to norm 1 if they are longer. None: every feature
            vector is divided by its own norm.
        intercept: Whether a constant column is appended. Everything is then divided by
            √2, so that the norms are still at most 1.

    Returns:
        float64 ``(n, d)``, or ``(n, d + 1)`` with an intercept. Vectors of zeros stay
        zero.

    Raises:
        ValueError: If the features are not a finite matrix or the bound is not above 0.
    """
    rows = checked_matrix(features)
    if bound is not None:
        positive(bound=bound, remedy="Pass a norm that few rows exceed.")
        rows = rows / bound
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    least = 0.0 if bound is None else 1.0
    rows = rows / np.where(norms > 0, np.maximum(norms, least), 1.0)
    if not intercept:
        return rows
    return np.append(rows, np.ones((len(rows), 1)), axis=1) / math.sqrt(2)


def checked_matrix(features: ArrayLike) -> NDArray[np.float64]:
    """Return features as float64, or raise unless they are a finite matrix.

    Args:
        features: ``(n, d)``.

    Raises:
        ValueError: If they are not.
    """
    rows = numbers("features", features)
    expect(
        rows.ndim == 2 and rows.size > 0,
        "features",
        f"an array of shape {rows.shape}",
        "must be a matrix of shape (n, d)",
        "Give one row for each example.",
    )
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    expect(
        wrong.size == 0,
        "features",
        f"NaN or inf in {wrong.size} rows, first in row {wrong[:1]}",
        "must be finite",
        "Find out which input makes the extractor overflow, or leave these rows out.",
    )
    return rows


def checked_rows(features: ArrayLike) -> NDArray[np.float64]:
    """Return feature vectors for training, of norm at most 1, or raise.

    Args:
        features: ``(n, d)``.

    Raises:
        ValueError: If they are not a finite matrix or a row has a norm above 1.
    """
    rows = checked_matrix(features)
    norms = np.linalg.norm(rows, axis=1)
    longest = int(norms.argmax())
    expect(
        norms[longest] <= 1 + ROUNDING,
        "features",
        f"{norms[longest]:.6g} in row {longest}",
        "must have rows of norm at most 1",
        "Scale them with opacus_pi.unlearning.heads.unit_rows, which looks at each row "
        "by itself.",
    )
    shortened: NDArray[np.float64] = rows / np.maximum(norms, 1.0)[:, None]
    return shortened
