"""Tug of war: one number for forgetting, keeping and generalising like the oracle.

>>> metrics = {"unlearning_accuracy": 0.1, "retain_accuracy": 1.0, "test_accuracy": 0.8}
>>> oracle = {"unlearning_accuracy": 0.2, "retain_accuracy": 1.0, "test_accuracy": 0.8}
>>> tug_of_war(metrics, oracle)
0.9
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range

_ACCURACIES = ("unlearning_accuracy", "retain_accuracy", "test_accuracy")


def tug_of_war(
    metrics: Mapping[str, float],
    oracle: Mapping[str, ArrayLike],
    *,
    forget_metric: str = "unlearning_accuracy",
) -> float:
    r"""Product of one minus the distances to the oracle on forget, retain, test set.

    :math:`(1 - |\Delta_F|)(1 - |\Delta_R|)(1 - |\Delta_T|)`; 1 is indistinguishable in
    these accuracies, higher is better.

    Args:
        metrics: ``evaluate``'s numbers for the unlearned model, each in [0, 1].
        oracle: The same for the retrained model, or arrays over seeds (means taken).
        forget_metric: What is compared on the forget set; with
            ``"membership_inference"`` this is ToW-MIA.

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
                f"must hold {name!r}",
                "Pass what evaluate returned.",
            )
        own = float(metrics[name])
        retrained = float(np.mean(np.asarray(oracle[name], dtype=np.float64)))
        values: dict[str, Any] = {name: (own, retrained)}
        in_range(0, 1, remedy="It is a fraction of examples.", **values)
        product *= 1 - abs(own - retrained)
    return product
