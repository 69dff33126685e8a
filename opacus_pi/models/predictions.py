"""One forward pass over a data set, from which every output-based metric is computed.

Metrics that need outputs only (accuracy, confidence, membership inference) share this
pass, so that a trace over epochs costs one pass for each set of examples. Losses and
margins are computed in float64, where those of well-fitted examples do not cancel.

>>> import torch
>>> model = torch.nn.Linear(2, 3)
>>> data_set = torch.utils.data.TensorDataset(
...     torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
... )
>>> predictions = predict(model, data_set, torch.nn.CrossEntropyLoss())
>>> predictions.losses.shape
(4,)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from opacus_pi._validate import expect
from opacus_pi.models.batches import (
    batches_of,
    device_of,
    forward,
    inputs_and_targets,
    to_device,
)
from opacus_pi.models.collating import Collate
from opacus_pi.models.losses import float64_losses
from opacus_pi.models.no_trace import evaluating
from opacus_pi.models.own_losses import Criterion

Data = Dataset[Any] | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Predictions:
    """Losses, confidences and correctness of a classifier on n examples.

    Attributes:
        losses: Loss of each example, computed from float64 outputs; float64 ``(n,)``.
        confidences: Softmax probability of the label, float64 ``(n,)``, in [0, 1].
        margins: ``ln(p / (1 - p))`` of the confidence p, computed without the
            cancellation at p near 1, float64 ``(n,)``.
        correct: Whether the label has the largest output, bool ``(n,)``; false where
            outputs are NaN, as those of a model that diverged.
    """

    losses: NDArray[np.float64]
    confidences: NDArray[np.float64]
    margins: NDArray[np.float64]
    correct: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.losses)


def predict(
    model: nn.Module,
    data: Data,
    criterion: Criterion,
    *,
    batch_size: int = 256,
    collate_fn: Collate | None = None,
) -> Predictions:
    """Evaluate a classifier on every example, without changing any training state.

    The model runs in evaluation mode without gradients, on the device where its
    parameters are. Its training flags and every random state are restored.

    Args:
        model: Classifier with outputs ``(b, num_classes)``; plain or wrapped by Opacus.
        data: A data set of pairs ``(input, label)``, read in its own order; or an
            iterable of batches ``(inputs, labels)``, such as a loader, read in the
            order in which it returns them. A batch may also be a dict with
            ``"labels"``, as in Hugging Face.
        criterion: ``criterion(outputs, labels)``, one loss per example; a torch loss
            module may have any reduction.
        batch_size: Batch size for a data set; it does not change the result.
        collate_fn: Makes a batch of a list of items of a data set, such as the one that
            pads in Hugging Face; torch's by default. A loader has its own.

    Returns:
        The predictions, in the order of ``data``.

    Raises:
        ValueError: If there is no example, no batch can be made, the criterion gives no
            loss per example, or the outputs are not one row of class scores for each
            example.
    """
    losses_of = float64_losses(criterion)
    loader = batches_of(data, batch_size, collate_fn)
    device = device_of(model)
    with evaluating(model):
        batches = [
            _batch(forward(model, x), y, losses_of)
            for x, y in (to_device(_labelled(b), device) for b in loader)
        ]
    expect(
        bool(batches),
        "data",
        "[]",
        "must contain at least one example",
        "Pass a data set or loader that is not empty.",
    )
    return Predictions(
        *(np.concatenate(column) for column in zip(*batches, strict=True))
    )


def _labelled(batch: Any) -> tuple[Any, Any]:
    """Return inputs and labels of a batch; refuse a single example in its place."""
    inputs, labels = inputs_and_targets(batch)
    expect(
        getattr(labels, "ndim", 0) > 0,
        "data",
        f"a label {labels!r} in place of the labels of a batch",
        "must be a data set, or an iterable of batches (inputs, labels)",
        "Pass a list of single examples in a DataLoader.",
    )
    return inputs, labels


def _batch(
    outputs: Tensor, labels: Tensor, losses_of: Criterion
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return losses, confidences, margins and correctness of one batch."""
    _check_scores(outputs, labels)
    losses = losses_of(outputs, labels)
    scores = outputs.cpu().double()
    column = labels.cpu().long()[:, None]
    at_label = scores.gather(1, column)[:, 0]
    others = scores.scatter(1, column, -torch.inf).logsumexp(1)
    margins = at_label - others
    return (
        losses.cpu().double().numpy(),
        margins.sigmoid().numpy(),
        margins.numpy(),
        ((scores.argmax(1) == column[:, 0]) & ~margins.isnan()).numpy(),
    )


def _check_scores(outputs: Tensor, labels: Tensor) -> None:
    """Raise unless there is one row of class scores and one label per example."""
    expect(
        outputs.dim() == 2 and labels.dim() == 1 and not labels.is_floating_point(),
        "model(inputs), labels",
        f"shapes {tuple(outputs.shape)}, {tuple(labels.shape)} ({labels.dtype})",
        "must be class scores (b, num_classes) and whole numbers (b,)",
        "These metrics are for classifiers; flatten other axes into examples.",
    )
