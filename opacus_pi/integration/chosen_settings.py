"""Notice that a training loop chooses the clip norm or the noise between updates.

The ledger records the settings of every update, and the accounting takes them as fixed
before training. A loop that sets ``optimizer.max_grad_norm`` to the median norm of the
batch releases that median without noise: with one example more or less, the update may
be of another size altogether. Opacus's schedulers and its adaptive clipping choose the
settings in code of Opacus, and are known.

*Guarantee.* Another value that is set after the first batch was delivered, by code that
is not Opacus's, leaves the link unchecked.

*What breaks it.* A value that was computed from training data and set before the first
batch, by a scheduler's own function, or past the optimizer's attributes
(``vars(optimizer)``). Learning rates and other settings are not looked at: guarantees
list the declaration that no setting depends on the data.
"""

import inspect
from typing import Any

__all__ = ["NOISE_AND_CLIPPING", "SET_BY_LOOP", "is_chosen_by_loop"]

NOISE_AND_CLIPPING = {"max_grad_norm": "norm", "noise_multiplier": "noise"}
"""Attributes of an optimizer, and the link that each of them belongs to."""
SET_BY_LOOP = (
    "The training loop set optimizer.{name} after the first batch was delivered. That "
    "is fine if the value was chosen without the training data, for example from the "
    "number of the update. If it was computed from gradients, losses or examples, it "
    "depends on who is in the batch, and neither get_epsilon nor the ledger covers "
    "that. With a scheduler of opacus.schedulers the link stays checked."
)
_KNOWN = ("opacus.", "opacus_pi.")


def is_chosen_by_loop(before: Any, value: Any) -> bool:
    """Return whether the caller's caller changes a setting, and is not Opacus's code.

    Args:
        before: The setting as it is.
        value: What it is set to.
    """
    try:
        is_same = bool(value == before)
    except (RuntimeError, ValueError):  # several numbers
        is_same = False
    return not (is_same or _callers_module().startswith(_KNOWN))


def _callers_module() -> str:
    """Return the name of the module whose code set the attribute."""
    frame = inspect.currentframe()
    for _ in range(3):  # this function, its caller, and ``__setattr__``
        frame = None if frame is None else frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))
