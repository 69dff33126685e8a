"""What is known about whether a run gets the data set that the model was trained on.

Positions name the examples. If the data set has changed, or only its order, the run
forgets other examples than those that were asked for, and its guarantee is about other
ones. So the fingerprint of the data set at hand is compared with that of the ledger:
a difference is refused elsewhere, and what could not be compared is declared here.
"""

from collections.abc import Iterable

from opacus_pi._validate import expect
from opacus_pi.accounting.guarantee import Assumption, observed
from opacus_pi.ledger.same_data import (
    compared,
    difference,
    num_erased,
    same_transforms,
)

_STATEMENT = "the data set and its order are those of the recorded training"
_PREPARED = "the transforms are those of the recorded training"


def same_data(recorded: Iterable[str | None], at_hand: str | None) -> Assumption:
    """Assume that positions name the examples of the training.

    Args:
        recorded: The data set that each ledger names, or None.
        at_hand: Fingerprint of the data set of the run; None in a plan, which gets no
            data set.

    Returns:
        The assumption: observed if content of every example was compared at its
        position, otherwise declared, with what was compared.
    """
    names = list(recorded)
    if not names:
        return Assumption(_STATEMENT, True, "there is no ledger to compare it with")
    if at_hand is None:
        why = "no data set is known here; unlearning compares it with the ledger"
        return Assumption(_STATEMENT, True, why)
    if None in names:
        return Assumption(_STATEMENT, True, "the ledger does not name its data set")
    found = [compared(name, at_hand) for name in names if name is not None]
    least = min(found, key=lambda one: one.covers_examples)
    statement = _STATEMENT + _except_erased(num_erased(at_hand))
    if least.covers_examples:
        return observed(statement, least.evidence)
    return Assumption(statement, True, least.evidence)


def _except_erased(number: int) -> str:
    """Return the end of the statement about a data set with erased examples.

    Args:
        number: How many examples were forgotten before, and are not read any more.
    """
    if not number:
        return ""
    words = "1 example that was" if number == 1 else f"{number} examples that were"
    return f", except for {words} forgotten before and may have been erased"


def same_preparation(recorded: str, at_hand: str | None) -> Assumption:
    """Assume that the rest of a training gets its examples through the same transforms.

    Args:
        recorded: The data set that the ledger names.
        at_hand: Fingerprint of the data set of the run; None in a plan.
    """
    if at_hand is not None and same_transforms(recorded, at_hand):
        return observed(_PREPARED, "they describe themselves alike")
    why = "the data set or the ledger does not describe them"
    if at_hand is None:
        why = "no data set is known here; the rewind compares them with the ledger"
    return Assumption(_PREPARED, True, why)


def require_same_preparation(recorded: str, at_hand: str) -> None:
    """Refuse to repeat a part of a training with other transforms.

    Args:
        recorded: The data set that the ledger names.
        at_hand: Fingerprint of the data set of the run.

    Raises:
        ValueError: If the transforms are known and differ.
    """
    expect(
        same_transforms(recorded, at_hand) is not False,
        "train_set",
        "a data set with other transforms",
        "must prepare its examples as in the recorded training, because a rewind "
        "repeats a part of it",
        "Pass the data set with the transforms (augmentation included) and the "
        "settings that it had in training.",
    )


def require_same_as_before(before: str | None, at_hand: str) -> None:
    """Refuse another data set than that of an unlearner's earlier runs.

    Args:
        before: Fingerprint of the data set of the earlier runs; None: no run.
        at_hand: Fingerprint of the data set of this run.

    Raises:
        ValueError: If they differ.
    """
    differs = "" if before is None else difference(before, at_hand)
    expect(
        not differs,
        "train_set",
        f"a data set that differs in {differs}",
        "must be that of this unlearner's earlier runs, because positions name the "
        "examples",
        "Pass the whole training set each time, in the same order. The examples that "
        "were forgotten before are left out by the unlearner.",
    )
