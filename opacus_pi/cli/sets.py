"""Forget set, a part of the retain set, test set: what the metrics are taken on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from opacus_pi._types import ArrayLike
from opacus_pi.accounting import fingerprint
from opacus_pi.cli.errors import BadInput
from opacus_pi.difficulty.forget_sets import retain_indices
from opacus_pi.evaluation import evaluate


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


def require_unseen(train_set: Any, test_set: Any) -> None:
    """Refuse the training set as a test set.

    Args:
        train_set: What the model was trained on.
        test_set: What it must not have seen.

    Raises:
        BadInput: If they are one object, or have the same class, length, labels and
            first example.
    """
    if test_set is train_set or _alike(train_set, test_set):
        raise BadInput(
            "--test: it is the training set of --data, so nothing would be unseen. "
            "Name examples that the model was not trained on."
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two labelled sets have the same labels and the same first example."""
    name = fingerprint(one)
    if name.count(":") < 2 or name != fingerprint(other):  # 2: contents were found
        return False
    first, second = one[0], other[0]
    if isinstance(first, tuple | list):
        first, second = first[0], second[0]
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))


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
