"""The metrics of one model as named numbers, from one pass over each of three sets.

No value of a metric is good or bad alone: compare it with its value for models that
were retrained without the forget set.

>>> unlearning_accuracy([True, True, False, True])
0.25
>>> metrics = {"unlearning_accuracy": 0.1, "retain_accuracy": 1.0, "test_accuracy": 0.8}
>>> oracle = {"unlearning_accuracy": 0.2, "retain_accuracy": 1.0, "test_accuracy": 0.8}
>>> tug_of_war(metrics, oracle)
0.9
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.evaluation.membership import MembershipInference, membership_inference
from opacus_pi.models.collating import Collate
from opacus_pi.models.own_losses import Criterion
from opacus_pi.models.predictions import Data, Predictions, predict

__all__ = ["accuracy", "evaluate", "summarise", "tug_of_war", "unlearning_accuracy"]

_ACCURACIES = ("unlearning_accuracy", "retain_accuracy", "test_accuracy")


def accuracy(correct: ArrayLike) -> float:
    """Compute the fraction of examples that are classified correctly.

    On the retain set this is the retain accuracy RA. On the test set it is the test
    accuracy TA, which the paper calls utility.

    Args:
        correct: Whether each example is classified correctly, shape ``(n,)``.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there is no example, or an entry is neither true nor false.

    Source: paper, Section 5.1.
    """
    expect(
        not isinstance(correct, Predictions),
        "correct",
        "Predictions",
        "must be a list of true and false",
        "Pass predictions.correct.",
    )
    array = np.asarray(correct)
    expect(
        array.size > 0,
        "correct",
        "[]",
        "must contain at least one example",
        "Pass the values of at least one example.",
    )
    expect(
        array.dtype.kind in "biuf" and bool(np.isin(array, (0, 1)).all()),
        "correct",
        f"{array.dtype} of shape {array.shape}",
        "must be true or false for each example",
        "Pass predicted_labels == labels, or predict(model, data, criterion).correct.",
    )
    return float(np.mean(array, dtype=np.float64))


def unlearning_accuracy(correct: ArrayLike) -> float:
    """Compute the fraction of the forget set that is classified wrongly, UA = 1 - FA.

    The value to reach is that of a model retrained without the forget set. A larger
    value is not better.

    Args:
        correct: Whether each example of the forget set is classified correctly,
            shape ``(m,)``.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: As ``accuracy``.

    Source: paper, Section 5.1.
    """
    return 1.0 - accuracy(correct)


def evaluate(
    model: nn.Module,
    criterion: Criterion,
    *,
    forget: Data,
    retain: Data,
    test: Data,
    batch_size: int = 256,
    collate_fn: Collate | None = None,
) -> dict[str, float]:
    """Evaluate a model on the forget, retain and test sets without changing anything.

    Each set is passed through the model once. For the retain set, a fixed subset as
    large as the test set is usually enough and saves most of the time.

    Args:
        model: Classifier; plain or wrapped by Opacus.
        criterion: ``criterion(outputs, labels)``, one loss per example.
        forget: The forget set: a data set or batches ``(inputs, labels)``.
        retain: The retain set, or a fixed subset of it.
        test: The test set.
        batch_size: Batch size for data sets.
        collate_fn: Makes a batch of a list of items of a data set; torch's by default.

    Returns:
        The numbers of :func:`summarise`.

    Raises:
        ValueError: As :func:`predict` does.
    """
    return summarise(
        *(
            predict(
                model, data, criterion, batch_size=batch_size, collate_fn=collate_fn
            )
            for data in (forget, retain, test)
        )
    )


def summarise(
    forget: Predictions, retain: Predictions, test: Predictions
) -> dict[str, float]:
    """Compute the metrics of one model from its predictions.

    Args:
        forget: Predictions on the forget set.
        retain: Predictions on the retain set.
        test: Predictions on the test set.

    Returns:
        ``unlearning_accuracy`` (1 - accuracy on the forget set), ``retain_accuracy``,
        ``test_accuracy``, ``forget_loss`` and ``forget_confidence`` (means over the
        forget set), ``membership_inference`` (fraction of the forget set that the
        attacker takes for test data) and ``attacker_accuracy`` (the balanced accuracy
        of this attacker on the retain and test sets). Of a model that diverged, whose
        outputs are NaN, all but the accuracies are NaN.

    Source: paper, Section 5.1.
    """
    attack = attack_on(retain, test, forget)
    return {
        "unlearning_accuracy": unlearning_accuracy(forget.correct),
        "retain_accuracy": accuracy(retain.correct),
        "test_accuracy": accuracy(test.correct),
        "forget_loss": float(forget.losses.mean()),
        "forget_confidence": float(forget.confidences.mean()),
        "membership_inference": attack.forget_called_test,
        "attacker_accuracy": attack.attacker_accuracy,
    }


def attack_on(
    retain: Predictions, test: Predictions, forget: Predictions
) -> MembershipInference:
    """Attack the membership of the forget set; NaN if the model diverged.

    Args:
        retain: Predictions on the retain set.
        test: Predictions on the test set.
        forget: Predictions on the forget set.

    Returns:
        The result of ``membership_inference``, or NaN if a confidence is NaN.
    """
    found = [part.confidences for part in (retain, test, forget)]
    if any(np.isnan(one).any() for one in found):
        return MembershipInference(math.nan, math.nan)
    return membership_inference(*found)


def tug_of_war(
    metrics: Mapping[str, float],
    oracle: Mapping[str, ArrayLike],
    *,
    forget_metric: str = "unlearning_accuracy",
) -> float:
    r"""Compare a model with the oracle on forget, retain and test set in one number.

    The number is :math:`(1 - |\Delta_F|)(1 - |\Delta_R|)(1 - |\Delta_T|)`, where each
    :math:`\Delta` is a difference of accuracies. Higher is better; 1 means that these
    accuracies equal those of the oracle.

    Args:
        metrics: What ``evaluate`` returned for the unlearned model, each in [0, 1].
        oracle: The same for the retrained model, or for each metric an array over
            seeds, whose mean is used.
        forget_metric: Which metric is compared on the forget set. With
            ``"membership_inference"`` the result is called ToW-MIA.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If a metric is missing or outside [0, 1].

    Source: Zhao et al. 2024 (arXiv:2406.01257), Section 3.
    """
    product = 1.0
    for name in (forget_metric, *_ACCURACIES[1:]):
        for label, given in (("metrics", metrics), ("oracle", oracle)):
            expect(
                name in given,
                label,
                sorted(given),
                f"must contain {name!r}",
                "Pass what evaluate returned.",
            )
        own = float(metrics[name])
        retrained = float(np.mean(np.asarray(oracle[name], dtype=np.float64)))
        values: dict[str, Any] = {name: (own, retrained)}
        in_range(0, 1, remedy="Pass a fraction of examples.", **values)
        product *= 1 - abs(own - retrained)
    return product
