"""The three sets that metrics are computed on: forget set, retain set, test set.

``unlearn`` and ``evaluate`` cut them in the same way, so that their numbers can be
compared, unless they are given different ``--seed``.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Subset

from opacus_pi._types import ArrayLike
from opacus_pi.accounting import fingerprint
from opacus_pi.cli.errors import BadInput
from opacus_pi.difficulty.forget_sets import retain_indices
from opacus_pi.evaluation import evaluate
from opacus_pi.evaluation.seen_examples import seen_in_training
from opacus_pi.ledger.erased_examples import not_erased
from opacus_pi.ledger.same_data import compared, same_data_set
from opacus_pi.models.collating import Collating

_NUM_READ = 64  # examples of the batch that is made as a trial
_MOST = 0.5  # a larger share of training examples makes a test set useless
_UNSEEN = (
    "but test examples must be unseen. Name examples that the model was not trained on."
)


@dataclass(frozen=True)
class Sets:
    """The sets and the loss that a model is evaluated with.

    Args:
        forget: The examples to forget.
        retain: A part of the retain set, as large as the test set if possible, so that
            membership inference compares sets of the same size.
        test: Unseen examples.
        criterion: The loss.
        collate_fn: Makes a batch of a list of items; None: torch's own.
    """

    forget: Any
    retain: Any
    test: Any
    criterion: Any
    collate_fn: Any = None

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Compute every metric of one model.

        Args:
            model: The model, which is not changed.
        """
        return evaluate(
            model,
            self.criterion,
            forget=self.forget,
            retain=self.retain,
            test=self.test,
            collate_fn=self.collate_fn,
        )


def require_unseen(
    train_set: Any, test_set: Any, forgotten_before: ArrayLike = ()
) -> None:
    """Refuse a test set that consists of training examples, and warn of a few.

    Args:
        train_set: The set that the model was trained on.
        test_set: A set that the model must not have seen.
        forgotten_before: Positions that are not read, because their data may have been
            erased.

    Raises:
        BadInput: If they are one data set, whatever their transforms, or most of the
            test examples are training examples.
    """
    if test_set is train_set or _look_equal(train_set, test_set):
        raise BadInput(f"--test: this is the training set of --data, {_UNSEEN}")
    gone = np.asarray(forgotten_before, dtype=np.int64)
    if len(gone):
        kept = np.setdiff1d(np.arange(len(train_set)), gone)
        train_set = Subset(train_set, kept.tolist())
    found = seen_in_training(train_set, test_set)
    percent = float(f"{100 * found.share:.2g}")
    words = (
        f"--test: about {percent:g} % of the test examples are training "
        f"examples of --data ({found.num_seen} of the {found.num_compared} that were "
        "compared equal one that was read)"
    )
    if found.share > _MOST:
        raise BadInput(f"{words}, {_UNSEEN}")
    if found.share:
        warnings.warn(
            f"{words}. Accuracy and membership inference on them mean nothing: leave "
            "them out.",
            stacklevel=2,
        )


def require_batches(train_set: Any, left_out: ArrayLike, collate_fn: Any) -> None:
    """Make a batch of training examples, before a request is entered or a model runs.

    Args:
        train_set: The training set.
        left_out: Positions that are not read.
        collate_fn: Makes a batch of a list of items; None: torch's own.

    Raises:
        ValueError: If no batch can be made.
    """
    kept = np.setdiff1d(np.arange(len(train_set)), left_out)[:_NUM_READ]
    if len(kept):
        Collating(collate_fn)([train_set[int(i)] for i in kept])


def _look_equal(one: Any, other: Any) -> bool:
    """Return whether two sets hold the same examples, as far as fingerprints tell."""
    name, other_name = fingerprint(one), fingerprint(other)
    found = compared(name, other_name)
    return same_data_set(name, other_name) and found.covers_examples


def make_sets(
    train_set: Any,
    test_set: Any,
    forget_indices: ArrayLike,
    criterion: Any,
    seed: int,
    forgotten_before: ArrayLike = (),
    collate_fn: Any = None,
) -> Sets:
    """Cut the training set into forget set and retain set.

    Args:
        train_set: The set that the model was trained on.
        test_set: Unseen examples.
        forget_indices: Positions of the forget set in the training set. Erased
            examples are left out.
        criterion: The loss.
        seed: Seed of the draw from the retain set.
        forgotten_before: Positions that are not in the retain set either.
        collate_fn: Makes a batch of a list of items; None: torch's own.

    Raises:
        ValueError: If the indices are bad, or the retain set would be empty.
    """
    retain = retain_indices(len(train_set), forget_indices)
    retain = np.setdiff1d(retain, np.asarray(forgotten_before, dtype=np.int64))
    size = min(len(retain), len(test_set))
    drawn = np.random.default_rng(seed).choice(retain, size, replace=False)
    forget = not_erased(train_set, np.unique(np.asarray(forget_indices)))
    return Sets(
        forget=Subset(train_set, forget.tolist()),
        retain=Subset(train_set, np.sort(drawn).tolist()),
        test=test_set,
        criterion=criterion,
        collate_fn=collate_fn,
    )
