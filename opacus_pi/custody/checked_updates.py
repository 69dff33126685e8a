"""Which updates of a run are looked at, where looking at all of them would be slow.

The first three, and one of each of the periods 4 to 9, 10 to 99, 100 to 999 and 1,000
to 9,999. A fault in a share s of the later updates, and in none of the first three, is
missed with a probability of about (1 - s)^4.

>>> checked_updates(random.Random(0))[:3]
[1, 2, 3]
"""

import random

__all__ = ["checked_updates"]

_FIRST_OF_PERIODS = (4, 10, 100, 1_000, 10_000)


def checked_updates(draws: random.Random) -> list[int]:
    """Return the numbers of the updates to look at, in rising order, counted from 1.

    Args:
        draws: Draws them; no secret, because it only spreads the checks.
    """
    periods = zip(_FIRST_OF_PERIODS, _FIRST_OF_PERIODS[1:], strict=False)
    return [1, 2, 3, *(draws.randrange(*period) for period in periods)]
