"""Say what a batch without examples is, if Poisson sampling draws it first.

Opacus gives an empty batch the form of the first batch that it has collated. If there
is none yet, it makes a list of empty tensors, one for each entry of the first item, and
does not call ``collate_fn``. Then a loop that expects a dict fails, and items that
contain texts or arrays make Opacus itself fail, both with errors about something else.

*What it gives.* A warning if ``collate_fn`` is the user's, because its batches may have
another form, and a note on the error of Opacus. Batches stay as they are.

*What breaks it.* Worker processes that are started anew (spawn) get a plain copy, which
says nothing.
"""

import warnings
from typing import Any

from opacus.data_loader import CollateFnWithEmpty
from torch.utils.data import DataLoader

from opacus_pi._class_swap import swap_class
from opacus_pi.attribution import keeps_order
from opacus_pi.integration.explanations import add_note

__all__ = ["explain_first_batch"]

_FIRST = (
    "The first batch is empty: Poisson sampling draws each example by chance, and drew "
    "none. Opacus gives an empty batch the form of an earlier one, and there is none "
    "yet. "
)
_LARGER = (
    "Use a larger batch size, with which an empty batch is rare (e to the power of "
    "-batch_size), or poisson_sampling=False"
)
_LIST = (
    f"{_FIRST}So this batch is a list of {{num}} tensors with 0 samples, one for each "
    "entry of an item, and collate_fn was not called. If collate_fn returns such a "
    "list or tuple, all is well. If it returns another form, such as a dict, the "
    f"training loop fails on this batch. {_LARGER}."
)
_NO_FORM = (
    f"{_FIRST}It cannot make one from the items of this data set, only from tuples of "
    f"tensors and numbers. {_LARGER}, or return such tuples."
)


def explain_first_batch(loader: DataLoader[Any]) -> None:
    """Have the first batch of a loader explained if it is empty.

    Args:
        loader: What Opacus returned; its ``collate_fn`` is changed in place if it is
            Opacus's, which is the case with Poisson sampling.
    """
    if isinstance(loader.collate_fn, CollateFnWithEmpty):
        swap_class(loader.collate_fn, _explaining)


def _explaining(base: type) -> type:
    """Make the subclass of Opacus's wrapper that explains an empty first batch."""

    class Explaining(base):
        def __call__(self, batch: list[Any]) -> Any:
            """Return the batch that Opacus makes."""
            if batch or self.first_batch is not None:
                return super().__call__(batch)
            try:
                made = super().__call__(batch)
            except TypeError as error:
                add_note(error, _NO_FORM)
                raise
            if not keeps_order(self.wrapped_collator_fn):
                warnings.warn(_LIST.format(num=len(made)), stacklevel=2)
            return made

    return Explaining
