"""Which updates of a run are looked at, where looking at all of them would be slow.

The first three, and one of each of the periods 4 to 9, 10 to 99, 100 to 999 and 1,000
to 9,999. A fault in a share s of the later updates, and in none of the first three, is
missed with a probability of about (1 - s)^4.

>>> checked_updates(random.Random(0))[:3]
[1, 2, 3]

A check that is cheap enough is made more often: in the passes 1, 2, 4, 8, 16, 32, and
in every 64th.

>>> [number for number in range(1, 200) if is_looked_at(number)]
[1, 2, 4, 8, 16, 32, 64, 128, 192]
"""

import random

__all__ = ["checked_updates", "is_looked_at"]

_EVERY = 64
_FIRST_OF_PERIODS = (4, 10, 100, 1_000, 10_000)


def checked_updates(draws: random.Random) -> list[int]:
    """Return the numbers of the updates to look at, in rising order, counted from 1.

    Args:
        draws: Draws them; no secret, because it only spreads the checks.
    """
    periods = zip(_FIRST_OF_PERIODS, _FIRST_OF_PERIODS[1:], strict=False)
    return [1, 2, 3, *(draws.randrange(*period) for period in periods)]


def is_looked_at(number: int) -> bool:
    """Return whether a cheap check is made in a pass.

    Args:
        number: Of the pass, counted from 1.
    """
    return number % _EVERY == 0 or number & (number - 1) == 0
