"""The link "draw": each batch that a loader delivered serves one update only.

Under Poisson sampling the accounting multiplies the privacy loss of single updates,
each on a draw of its own. If two updates use one draw, an example is in both or in
neither, so the two together are one update with twice the gradient. The privacy loss
then grows with the square: for ten updates on one draw it is up to a hundred times as
large. So a second update on a delivered batch breaks the link. Under fixed sampling
there is no amplification and participations are counted, so a second update is allowed.

*What breaks it.* A second update on a batch that is no longer recognised, because it
was copied and changed or was delivered long ago. The samples of such a batch are
unattributed, and the link "identity" counts them.
"""

from collections.abc import Iterable
from typing import Protocol

from opacus_pi.custody.chain import Chain

__all__ = ["DrawLink"]

_USED_TWICE = (
    "A batch that the loader delivered was used for more than one update. The "
    "accounting assumes that every update draws a fresh batch; several updates on one "
    "batch have a much larger privacy loss. Make one optimizer.step() for each batch "
    "that the loader yields, and iterate over the loader again instead of keeping its "
    "batches. Alternatively, pass poisson_sampling=False: the accounting then counts "
    "every participation."
)

_ONCE = "No delivered batch was used for more than one update."
_COUNTED = "Under fixed sampling every participation is counted."


class Delivered(Protocol):
    """The part of a delivered batch that this link looks at."""

    num_updates: int


class DrawLink:
    """Check that no delivered batch is used in a second update.

    Args:
        chain: The chain of custody of the run.
        is_poisson: Whether every update needs a draw of its own.
    """

    def __init__(self, chain: Chain, *, is_poisson: bool) -> None:
        self._chain, self._is_poisson = chain, is_poisson
        self._has_checked = False

    def update_was_made(self, batches: Iterable[Delivered]) -> None:
        """Note which delivered batches have entered an update.

        Args:
            batches: Each with the number of updates that it has entered, this one
                included.
        """
        if self._is_poisson:
            for batch in batches:
                if batch.num_updates > 1:
                    self._chain.break_link("draw", _USED_TWICE)
                    return
        if not self._has_checked:
            self._has_checked = True
            self._chain.check("draw", _ONCE if self._is_poisson else _COUNTED)
