"""Make batches of items, and say which argument is at fault where that is impossible.

Items of different lengths need a function that pads them, and a data set may have
columns, such as texts, that a trainer leaves out before it makes batches. The error of
torch or of a tokenizer names neither.

>>> import torch
>>> Collating(None)([torch.zeros(2), torch.zeros(3)])  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
ValueError: No collate_fn was given, and torch cannot make a batch of these items ...
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import default_collate

__all__ = ["COLLATE_ERRORS", "Collating", "columns_of_text"]

Collate = Callable[[list[Any]], Any]

COLLATE_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What a function that makes batches may raise for items that it cannot use."""

_NOT_GIVEN = (
    "No collate_fn was given, and torch cannot make a batch of these items ({error})."
)
_FAILED = "collate_fn cannot make a batch of these items ({error})."
_PASS = (
    "Pass collate_fn=..., the function with which the training made its batches, such "
    "as DataCollatorWithPadding(tokenizer)."
)
_COLUMNS = (
    "The items have texts in the columns {names}, which a Trainer leaves out. Pass "
    "data_set.remove_columns([{names}])."
)
_OTHER = "Pass the function with which the training made its batches."


class Collating:
    """Makes batches as a ``collate_fn`` does, with an error that names the remedy.

    Args:
        collate_fn: Makes a batch of a list of items; None: torch's own.
    """

    def __init__(self, collate_fn: Collate | None) -> None:
        self._collate_fn = collate_fn

    def __call__(self, items: list[Any]) -> Any:
        """Return a batch.

        Args:
            items: Items of a data set.

        Raises:
            ValueError: If it cannot be made.
        """
        collate = self._collate_fn or default_collate
        try:
            return collate(items)
        except COLLATE_ERRORS as error:
            first = f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(".")
            is_given = self._collate_fn is not None
            text = (_FAILED if is_given else _NOT_GIVEN).format(error=first)
            names = ", ".join(columns_of_text(items))
            remedies = [] if is_given else [_PASS]
            remedies += [_COLUMNS.format(names=names)] if names else []
            remedy = " ".join(remedies or [_OTHER])
            raise ValueError(f"{text} {remedy}") from error


def columns_of_text(items: Sequence[Any]) -> list[str]:
    """Return the names of the entries of an item that are texts."""
    first = items[0] if len(items) else None
    if not isinstance(first, Mapping):
        return []
    return [repr(name) for name, value in first.items() if isinstance(value, str)]
