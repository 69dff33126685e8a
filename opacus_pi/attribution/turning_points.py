"""Tell a setting that follows a schedule from one that is computed from each batch.

A schedule may have any form, such as a warm-up and a cosine, but it seldom changes its
direction. A quantity of random batches, such as a loss, a norm or a number of samples,
does so at two of three places; an average of the latest ones at every second place.

*Guarantee.* Let the values of successive updates be independent, with the same
distribution, which has no atoms. Each place is then a turning point with probability
2/3, so :meth:`TurningPoints.are_many` becomes true soon. It stays false for values that
turn at no more than two of every six places, however long they are followed, and for
cycles of any length that repeat the same values.

*What breaks it.* Quantities of batches that turn rarely: a sum or a largest value of
all batches so far, and an average that follows a trend. A choice between two values.
Fewer than seven values. In return, cycles of five updates or fewer whose values are
never repeated are taken for quantities of batches.

>>> cosine, noise = TurningPoints(), TurningPoints()
>>> for update in range(20):
...     cosine.add(1 + math.cos(math.pi * update / 20))
...     noise.add(math.cos(1000 * update**2))
>>> cosine.are_many(), noise.are_many()
(False, True)
"""

import math

__all__ = ["TurningPoints"]

_FEW, _FEW_LATER = 5, 8  # turning points that are needed: at first, later
_SHARE, _SHARE_LATER = 0.5, 0.4  # of the places; more turning points are many
_WINDOW = 32  # places that are counted together
_TOLERANCE = 1e-6  # of the largest value: smaller changes may be rounding
_NUM_REMEMBERED = 64  # turning points that are recognised when they come again


class TurningPoints:
    """Count at how many places a sequence of numbers changes its direction.

    A place is a number that differs from those before and after it; equal neighbours
    are one number. A turning point that has the same neighbours as an earlier one, as
    in a cycle, is not counted, and its place is not either.
    """

    def __init__(self) -> None:
        self._largest = 0.0
        self._before = self._last = math.nan
        self._rises: bool | None = None
        self._num_places = self._num_turns = 0
        self._is_first_window = True
        self._seen: set[tuple[str, ...]] = set()

    def add(self, value: float) -> None:
        """Add the next number.

        Args:
            value: The number; infinite ones and NaN are left out.
        """
        if not math.isfinite(value):
            return
        self._largest = max(self._largest, abs(value))
        if math.isnan(self._last):
            self._last = value
            return
        if abs(value - self._last) <= _TOLERANCE * self._largest:
            return
        rises = value > self._last
        if self._rises is not None:
            self._count(value, is_turn=rises != self._rises)
        self._before, self._last, self._rises = self._last, value, rises

    def are_many(self, few: int = _FEW) -> bool:
        """Return whether the numbers turn as often as quantities of batches do.

        Args:
            few: How many turning points are needed among the first places.
        """
        if not self._is_first_window:
            few = _FEW_LATER
        share = _SHARE if self._is_first_window else _SHARE_LATER
        return few <= self._num_turns > share * self._num_places

    def _count(self, value: float, *, is_turn: bool) -> None:
        """Count the place of the last number.

        Args:
            value: The number after it.
            is_turn: Whether the direction changes there.
        """
        if is_turn:
            place = tuple(f"{v:.5g}" for v in (self._before, self._last, value))
            if place in self._seen:
                return
            if len(self._seen) < _NUM_REMEMBERED:
                self._seen.add(place)
        if self._num_places == _WINDOW:
            self._num_places = self._num_turns = 0
            self._is_first_window = False
        self._num_places += 1
        self._num_turns += is_turn
