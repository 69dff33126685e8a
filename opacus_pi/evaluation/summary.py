"""Every output-based metric of unlearning, from one pass over each of three sets."""

from torch import nn

from opacus_pi.evaluation.accuracies import accuracy, unlearning_accuracy
from opacus_pi.evaluation.membership import membership_inference
from opacus_pi.models.losses import Criterion
from opacus_pi.models.predictions import Data, Predictions, predict


def evaluate(
    model: nn.Module,
    criterion: Criterion,
    *,
    forget: Data,
    retain: Data,
    test: Data,
    batch_size: int = 256,
) -> dict[str, float]:
    """Evaluate a model on forget, retain and test set, leaving no trace.

    Each set is passed through the model once. A fixed subset of the retain set of the
    test set's size is usually enough, and several times cheaper.

    Args:
        model: Classifier; plain or wrapped by Opacus.
        criterion: ``criterion(outputs, labels)``, one loss per example.
        forget: The forget set: a data set or batches ``(inputs, labels)``.
        retain: The retain set, or a fixed part of it.
        test: The test set.
        batch_size: Batch size for data sets.

    Returns:
        The numbers of :func:`summarise`.

    Raises:
        ValueError: As :func:`predict` does.
    """
    return summarise(
        *(
            predict(model, data, criterion, batch_size=batch_size)
            for data in (forget, retain, test)
        )
    )


def summarise(
    forget: Predictions, retain: Predictions, test: Predictions
) -> dict[str, float]:
    """The metrics of one model as named numbers.

    Args:
        forget: Predictions on the forget set.
        retain: Predictions on the retain set.
        test: Predictions on the test set.

    Returns:
        ``unlearning_accuracy`` (1 - accuracy on the forget set), ``retain_accuracy``,
        ``test_accuracy``, ``forget_loss`` and ``forget_confidence`` (means over the
        forget set), ``membership_inference`` (fraction of the forget set called test)
        and ``attacker_accuracy`` (the attacker's own balanced accuracy).

    Source: paper, Section 5.1.
    """
    attack = membership_inference(
        retain.confidences, test.confidences, forget.confidences
    )
    return {
        "unlearning_accuracy": unlearning_accuracy(forget.correct),
        "retain_accuracy": accuracy(retain.correct),
        "test_accuracy": accuracy(test.correct),
        "forget_loss": float(forget.losses.mean()),
        "forget_confidence": float(forget.confidences.mean()),
        "membership_inference": attack.forget_called_test,
        "attacker_accuracy": attack.attacker_accuracy,
    }
