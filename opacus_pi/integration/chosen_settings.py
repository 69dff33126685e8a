"""Notice that a training loop chooses the clip norm or the noise from batch to batch.

The ledger records the settings of every update, and the accounting takes them as fixed
before training. A loop that sets ``optimizer.max_grad_norm`` to the median norm of the
batch releases that median without noise: with one example more or less, the update may
be of another size altogether. Opacus's schedulers and its adaptive clipping choose the
settings in code of Opacus, and are known. A schedule that the loop keeps by hand
follows a rule (:mod:`~opacus_pi.attribution.value_sequences`); what is computed from
each batch does not.

*Guarantee.* If code that is not Opacus's sets other values after the first batch was
delivered, those of the updates follow no rule, and they rise and fall as quantities of
batches do (:mod:`~opacus_pi.attribution.turning_points`), the link is left unchecked.

*What breaks it.* A single change, which follows every rule, and values that only rise
or only fall, such as a hand-made decay. Values that turn rarely, such as an average of
many batches. A value that was computed from training data and set before the first
batch, by a scheduler's own function, or past the optimizer's attributes
(``vars(optimizer)``). Learning rates: :mod:`~opacus_pi.integration.chosen_rates`.
"""

import inspect
from typing import Any

import numpy as np

from opacus_pi.attribution.turning_points import TurningPoints
from opacus_pi.attribution.value_sequences import ValueSequence
from opacus_pi.custody import Chain

__all__ = ["NOISE_AND_CLIPPING", "ChosenSettings"]

NOISE_AND_CLIPPING = {"max_grad_norm": "norm", "noise_multiplier": "noise"}
"""Attributes of an optimizer, and the link that each of them belongs to."""
_CHOSEN = (
    "The training loop set optimizer.{name} to values that rise and fall without a "
    "rule that the library knows. That is fine if they were chosen without the "
    "training data, for example from the number of the update. If they were computed "
    "from gradients, losses or examples, they depend on who is in the batch, and "
    "neither get_epsilon nor the ledger covers that. With a scheduler of "
    "opacus.schedulers the link stays checked."
)
_KNOWN = ("opacus.", "opacus_pi.")
_FEW = 3  # turning points without a rule that are needed among the first places


class ChosenSettings:
    """The settings that the training loop has set, and their values in the updates.

    Args:
        chain: The chain of custody of the run.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._values: dict[str, ValueSequence] = {}
        self._turns: dict[str, TurningPoints] = {}

    def is_set(self, name: str, before: Any, value: Any) -> None:
        """Follow a setting from now on if the loop is changing it.

        Called by ``__setattr__`` itself, whose caller decides.

        Args:
            name: A key of ``NOISE_AND_CLIPPING``.
            before: Its value.
            value: The new value.
        """
        if name in self._values or _callers_module().startswith(_KNOWN):
            return
        if (number := _number(before)) is not None and number != _number(value):
            self._values[name] = ValueSequence()
            self._turns[name] = TurningPoints()
            self._add(name, number)

    def update_is_made(self, optimizer: Any) -> None:
        """Note the values with which an update is made, if the loop has set them.

        Args:
            optimizer: The optimizer, which is about to add noise.
        """
        for name, values in self._values.items():
            number = _number(getattr(optimizer, name))
            if number is not None:
                self._add(name, number)
            if not values.is_explained and self._turns[name].are_many(_FEW):
                text = _CHOSEN.format(name=name)
                self._chain.leave_unchecked(NOISE_AND_CLIPPING[name], text)

    def _add(self, name: str, number: float) -> None:
        """Add a value of a setting."""
        self._values[name].add(np.array([number]))
        self._turns[name].add(number)


def _number(value: Any) -> float | None:
    """Return a setting as a number; None if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _callers_module() -> str:
    """Return the name of the module whose code set the attribute."""
    frame = inspect.currentframe()
    for _ in range(3):  # this function, ``is_set`` and ``__setattr__``
        frame = None if frame is None else frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))
