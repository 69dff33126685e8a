"""Tell whether the values of an input that all examples share may follow a schedule.

A loop gives a model, beside the examples, constants, temperatures and step counters.
These stay the same, alternate between two values, or rise or fall by a rule. A number
that the loop computes from each batch, such as its mean, follows no rule.

*Guarantee.* Values are explained if they are constant; if only two different ones occur
in many passes; if they change by the same amount or by the same factor each time, also
if they begin again or end at a last value; or if they are single whole numbers that
rise, and may begin again at 0, 1 or the first of them.

*What breaks it.* A quantity of the batch that rises in every batch and is a whole
number, such as a count of all that was seen.

>>> values = ValueSequence()
>>> for value in (1.0, 0.9, 0.81):
...     values.add(np.array([value]))
>>> values.is_explained
True
>>> values.add(np.array([0.85]))
>>> values.is_explained
False
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["ValueSequence"]

Values = NDArray[np.float64]

_TOLERANCE = 1e-3  # of a change, which rounding may cause
_MANY = 8  # passes in which a quantity of the batch would have more than two values


class ValueSequence:
    """The values of one input, one after the other.

    Args:
        rounding: Relative rounding error of the values.

    Attributes:
        rounding: As given.
        num: How many values there were.
        num_changes: How often a value was new: unlike the first, second and last one.
    """

    def __init__(self, rounding: float = 0.0) -> None:
        self.num = self.num_changes = 0
        self.rounding = rounding
        self._first: Values | None = None
        self._second: Values | None = None
        self._last: Values | None = None
        self._follows = {"steps": True, "factors": True, "counts": True}
        self._has_ended = False

    @property
    def is_explained(self) -> bool:
        """Return whether the values are constant or may follow a schedule."""
        if self.num_changes == 1 and not self._follows["counts"]:
            return self.num >= _MANY
        return not self.num_changes or any(self._follows.values())

    def add(self, value: Values) -> None:
        """Add the next value.

        Args:
            value: Some entries of the input, always the same ones.
        """
        self.num += 1
        if self._first is None:
            self._first = self._last = value
            self._follows["counts"] = _is_whole(value)
            return
        known = (self._last, self._first, self._second)
        if any(_are_equal(value, before) for before in known if before is not None):
            self._last = value
            return
        self.num_changes += 1
        if self._second is None:
            self._second = value
            self._follows["counts"] &= _is_whole(value)
        else:
            self._compare(value)
        self._last = value

    def _compare(self, value: Values) -> None:
        """Note which rules a new value follows.

        Args:
            value: Differs from the last one, and is at least the third.
        """
        first, second, last = self._first, self._second, self._last
        assert first is not None and second is not None and last is not None
        with np.errstate(all="ignore"):
            expected = {
                "steps": last + (second - first),
                "factors": last * (second / first),
            }
        room = _TOLERANCE * np.abs(second - first) + self.rounding * np.abs(last)
        for rule, right in expected.items():
            if self._follows[rule] and not _are_near(value, right, room):
                self._follows[rule] = self._ends(value, right, last)
        rises = bool((value > last).all() or value.flat[0] in (0.0, 1.0))
        self._follows["counts"] &= _is_whole(value) and rises

    def _ends(self, value: Values, expected: Values, last: Values) -> bool:
        """Return whether a value is the last of a schedule, such as a lower limit.

        Args:
            value: The value.
            expected: The one that the schedule would have without a limit.
            last: The value before.
        """
        if self._has_ended or self.num_changes <= _MANY:
            return False
        lies_between = (value - expected) * (value - last) <= 0
        self._has_ended = bool(lies_between.all())
        return self._has_ended


def _is_whole(value: Values) -> bool:
    """Return whether a value is a single whole number."""
    return value.size == 1 and bool((value == np.round(value)).all())


def _are_equal(one: Values, other: Values) -> bool:
    """Return whether two values are equal in all entries."""
    return np.array_equal(one, other, equal_nan=True)


def _are_near(one: Values, other: Values, room: Values) -> bool:
    """Return whether no entry of two values differs by more than it may."""
    return bool((np.abs(one - other) <= room).all())
