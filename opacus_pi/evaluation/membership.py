"""Membership inference: does the forget set look like training data or test data?

>>> result = membership_inference([0.9, 0.95, 0.99], [0.2, 0.4, 0.3], [0.3, 0.97])
>>> result
MembershipInference(forget_called_test=0.5, attacker_accuracy=1.0)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers

_FAR = 1e100  # standard deviations; the attacker's answer no longer changes


@dataclass(frozen=True)
class MembershipInference:
    """Result of a membership attack; ``float(result)`` is the first number.

    Attributes:
        forget_called_test: Fraction of the forget set that the attacker takes for test
            data. Higher means more forgotten. The value to reach is that of a model
            retrained without the forget set.
        attacker_accuracy: Balanced accuracy with which the attacker separates the
            retain set from the test set, on the examples it was fitted to. If it is
            near 1/2, the attacker cannot separate them, and ``forget_called_test`` has
            no meaning.
    """

    forget_called_test: float
    attacker_accuracy: float

    def __float__(self) -> float:
        """Return ``forget_called_test``."""
        return self.forget_called_test


def membership_inference(
    retain_confidences: ArrayLike,
    test_confidences: ArrayLike,
    forget_confidences: ArrayLike,
) -> MembershipInference:
    """Fit a logistic regression to retain and test set, and apply it to the forget set.

    The only feature is the confidence (softmax at the label). Both classes have the
    same weight whatever their sizes, and the feature is standardized. Otherwise
    unbalanced sets or a narrow range of confidences would make the attacker always give
    the same answer. If all retain and test confidences are equal, the attacker can only
    guess, and the result is 1/2. If all scores come from one distribution, the expected
    result is 1/2 for sets of equal size, and lower by O(1/√m) if the smaller set has m
    examples.

    Args:
        retain_confidences: Confidences on retained training examples, shape ``(r,)``.
        test_confidences: Confidences on test examples, shape ``(t,)``.
        forget_confidences: Confidences on the forget set, shape ``(m,)``.

    Returns:
        The fraction of the forget set that the attacker takes for test data, and the
        accuracy of the attacker.

    Raises:
        ValueError: If a set is empty or a confidence is outside [0, 1] or NaN.

    Source: paper, Section 5.1 and Appendix E; the class weights are our addition.
    """
    retain = _feature(retain_confidences=retain_confidences)
    test = _feature(test_confidences=test_confidences)
    forget = _feature(forget_confidences=forget_confidences)
    seen = np.concatenate([retain, test])
    if np.ptp(seen) == 0:
        return MembershipInference(0.5, 0.5)
    # A collapsed model has confidences of 1e-300, whose squares underflow. Multiplied
    # by a power of two nothing is rounded, and the attacker stays the same.
    exponent = -int(np.frexp(seen.max())[1])
    seen = np.ldexp(seen, exponent)
    centre, spread = seen.mean(), seen.std()
    with np.errstate(over="ignore"):
        forget = (np.ldexp(forget, exponent) - centre) / spread
    forget = np.clip(forget, -_FAR, _FAR)
    is_test = np.repeat([False, True], [len(retain), len(test)])
    from sklearn.linear_model import LogisticRegression  # imported late: it is slow
    from sklearn.metrics import balanced_accuracy_score

    attacker = LogisticRegression(class_weight="balanced")
    attacker.fit((seen - centre) / spread, is_test)
    called_test = attacker.predict(forget)
    own = attacker.predict((seen - centre) / spread)
    return MembershipInference(
        float(called_test.mean()), float(balanced_accuracy_score(is_test, own))
    )


def _feature(**named: ArrayLike) -> NDArray[np.float64]:
    """Return the confidences as one column, after checking them.

    Args:
        **named: One set of confidences, by the name of its argument.

    Returns:
        float64 ``(size, 1)``, the form in which scikit-learn takes a feature.

    Raises:
        ValueError: If there is none, or one is outside [0, 1] or NaN.
    """
    ((name, values),) = named.items()
    array = numbers(name, values).reshape(-1, 1)
    expect(
        array.size > 0,
        name,
        "[]",
        "must contain at least one example",
        "Pass the values of at least one example.",
    )
    checked: dict[str, Any] = {name: array}
    in_range(0, 1, remedy="Pass softmax probabilities of the label.", **checked)
    return array
