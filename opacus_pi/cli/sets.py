"""Forget set, a part of the retain set, test set: what the metrics are taken on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Subset

from opacus_pi._types import ArrayLike
from opacus_pi.evaluation import evaluate
from opacus_pi.forget_sets import retain_indices


@dataclass(frozen=True)
class Sets:
    """What a model is evaluated on.

    Args:
        forget: The examples to forget.
        retain: As many of the others as the test set has, drawn once.
        test: Unseen examples.
        criterion: The loss.
    """

    forget: Any
    retain: Any
    test: Any
    criterion: Any

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Every metric of one model."""
        return evaluate(
            model,
            self.criterion,
            forget=self.forget,
            retain=self.retain,
            test=self.test,
        )


def make_sets(
    train_set: Any,
    test_set: Any,
    forget_indices: ArrayLike,
    criterion: Any,
    seed: int,
    gone: ArrayLike = (),
) -> Sets:
    """Cut the sets.

    Args:
        train_set: What the model was trained on.
        test_set: Unseen examples.
        forget_indices: Positions in the training set.
        criterion: The loss.
        seed: Of the draw from the retain set.
        gone: What was forgotten before, kept out of the retain set.

    Raises:
        ValueError: If the indices are bad, or nothing stays.
    """
    retain = retain_indices(len(train_set), forget_indices)
    retain = np.setdiff1d(retain, np.asarray(gone, dtype=np.int64))
    size = min(len(retain), len(test_set))
    drawn = np.random.default_rng(seed).choice(retain, size, replace=False)
    forget = np.unique(np.asarray(forget_indices))
    return Sets(
        forget=Subset(train_set, forget.tolist()),
        retain=Subset(train_set, np.sort(drawn).tolist()),
        test=test_set,
        criterion=criterion,
    )
