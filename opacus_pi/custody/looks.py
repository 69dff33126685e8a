"""Which updates, passes or batches of a run are looked at, where not all of them are.

A check that takes long is made in the first three updates, and in one of each of the
periods 4 to 9, 10 to 99, 100 to 999 and 1,000 to 9,999. A fault in a share s of the
later updates, and in none of the first three, is missed with a probability of about
(1 - s)^4.

>>> few_updates(random.Random(0))[:3]
[1, 2, 3]

A check that is cheap enough is made more often: in the passes 1, 2, 4, 8, 16, 32, and
in every 64th.

>>> looks = Looks()
>>> [number for number in range(1, 200) if looks.count()]
[1, 2, 4, 8, 16, 32, 64, 128, 192]
"""

import math
import random
from collections.abc import Iterable

__all__ = ["Looks", "few_updates"]

_EVERY = 64
_FIRST_OF_PERIODS = (4, 10, 100, 1_000, 10_000)


def few_updates(draws: random.Random) -> list[int]:
    """Return the numbers of the updates to look at, in rising order, counted from 1.

    Args:
        draws: Draws them; no secret, because it only spreads the checks.
    """
    periods = zip(_FIRST_OF_PERIODS, _FIRST_OF_PERIODS[1:], strict=False)
    return [1, 2, 3, *(draws.randrange(*period) for period in periods)]


class Looks:
    """Counts updates, passes or batches, and says which of them are looked at.

    Args:
        numbers: The numbers of those to look at, in rising order, counted from 1; None:
            1, 2, 4, 8, 16, 32, and every 64th.

    Attributes:
        num_past: How many were counted.
        is_due: Whether the one under way, which was not counted yet, is looked at.
    """

    def __init__(self, numbers: Iterable[int] | None = None) -> None:
        self._numbers = None if numbers is None else iter(numbers)
        first = 1 if self._numbers is None else next(self._numbers, math.inf)
        self._next: float = first
        self.num_past, self.is_due = 0, first == 1

    @property
    def is_near(self) -> bool:
        """Whether the one under way or the one after it is looked at."""
        return self._next <= self.num_past + 2

    @property
    def are_over(self) -> bool:
        """Whether none is looked at any more."""
        return self._next == math.inf

    def count(self, *, is_done: bool = True) -> bool:
        """Count the one under way, and return whether it was one to look at.

        Args:
            is_done: Whether it was looked at, if it was to be; otherwise the one after
                it is looked at instead.
        """
        was_due, self.num_past = self.is_due, self.num_past + 1
        if was_due and is_done:
            if self._numbers is None:
                self._next += min(self._next, _EVERY)
            else:
                self._next = next(self._numbers, math.inf)
        self.is_due = self._next <= self.num_past + 1
        return was_due

    def end(self) -> None:
        """Look at none any more."""
        self._next, self.is_due = math.inf, False
