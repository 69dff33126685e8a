"""Accuracies and means over a data set's predictions.

>>> unlearning_accuracy([True, True, False, True])
0.25
"""

import numpy as np

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect


def accuracy(correct: ArrayLike) -> float:
    """Fraction of examples that are classified correctly.

    On the retain set this is the retain accuracy RA, on the test set the test accuracy
    TA (the paper's utility).

    Args:
        correct: Whether each example is classified correctly, shape ``(n,)``.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there is no example.

    Source: paper, Section 5.1.
    """
    array = np.asarray(correct)
    expect(
        array.size > 0,
        "correct",
        "[]",
        "must hold an example",
        "Evaluate on some data.",
    )
    return float(np.mean(array, dtype=np.float64))


def unlearning_accuracy(correct: ArrayLike) -> float:
    """UA = 1 - FA: fraction of the forget set that is classified wrongly.

    Neither high nor low is good in itself: the model retrained without the forget set
    shows the value to reach.

    Args:
        correct: Whether each example of the forget set is classified correctly,
            shape ``(m,)``.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there is no example.

    Source: paper, Section 5.1.
    """
    return 1.0 - accuracy(correct)
