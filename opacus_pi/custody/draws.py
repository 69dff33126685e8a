"""The link "draw": each batch that a loader delivered serves one update only.

Under Poisson sampling the accounting multiplies the privacy loss of single updates,
each on a draw of its own. If two updates use one draw, an example is in both or in
neither, so the two together are one update with twice the gradient. The privacy loss
then grows with the square: for ten updates on one draw it is up to a hundred times as
large. So a second update on a delivered batch breaks the link. Under fixed sampling
there is no amplification and participations are counted, so a second update is allowed.

For the same reason an update must not hold samples of more draws than the accountant
has counted: an example then had more chances to be in it than its sample rate says, and
may be in it several times. The physical batches that ``BatchMemoryManager`` makes of
one draw are one draw. Several backward passes before one step, which Opacus forbids
unless ``allow_grad_accumulation`` is called, are charged as so many draws.

*What breaks it.* A second update on a batch that is no longer recognised, because it
was copied and changed or was delivered long ago. The samples of such a batch are
unattributed, and the link "identity" counts them.

**Equal draws.** Under Poisson sampling all sets of b of the n examples are equally
likely to be the draw of an update of b examples. If a draw is one of those before, with
a probability below 10^-12 (in consecutive updates if one is not enough), the generator
of the loader was put back, and the draw is not a new one. *What breaks it:* draws with
an example that is not known, because of ``collate_fn`` for example, are not compared.
Draws before a run was resumed are not known. The rest is as in
``custody/seen_states.py``.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opacus_pi.custody.chain import Chain
from opacus_pi.custody.seen_states import SeenStates

__all__ = ["DrawLink"]

_USED_TWICE = (
    "A batch that the loader delivered was used for more than one update. The "
    "accounting assumes that every update draws a fresh batch; several updates on one "
    "batch have a much larger privacy loss. Make one optimizer.step() for each batch "
    "that the loader yields, and iterate over the loader again instead of keeping its "
    "batches. Alternatively, pass poisson_sampling=False: the accounting then counts "
    "every participation."
)
_DRAWN_AGAIN = (
    "The examples of an update are those of an earlier one, which does not happen by "
    "chance: the generator from which the loader draws its batches was put back, for "
    "example by torch.manual_seed with one seed in every epoch. The accounting assumes "
    "that every update draws a fresh batch. Seed the generator once."
)
_SEVERAL_DRAWS = (
    "An update used samples of {num} batches that were drawn one after another, but "
    "Opacus's accountant counted the sample rate of {charged} of them. So each example "
    "had more chances to be in the update than the accounting assumes. Make an update "
    "with each batch that the loader delivers. Leave a loop over BatchMemoryManager "
    "only after the last part of a batch, when the weights have been written, and call "
    "optimizer.step() for each part. To make an update of several batches, use a "
    "larger batch_size, and BatchMemoryManager if it does not fit into memory."
)
_LEAST_EVIDENCE = 12 * math.log(10)
_ONCE = "No delivered batch was used for more than one update."
_COUNTED = "Under fixed sampling every participation is counted."


class Delivered(Protocol):
    """The part of a delivered batch that this link looks at."""

    num_updates: int
    draw: Any  # a key that the parts of one draw share

    @property
    def index_array(self) -> NDArray[np.int64] | None:
        """The indices of its samples, negative where they are not known."""


class DrawLink:
    """Check that no delivered batch, and no draw, is used in a second update.

    Args:
        chain: The chain of custody of the run.
        is_poisson: Whether every update needs a draw of its own.
        num_examples: Number of examples of the data set.
    """

    def __init__(self, chain: Chain, *, is_poisson: bool, num_examples: int) -> None:
        self._chain, self._is_poisson = chain, is_poisson
        self._num_examples = num_examples
        self._has_checked = False
        self._drawn, self._evidence = SeenStates(), 0.0

    def update_was_made(
        self, batches: Iterable[Delivered], *, num_charged: float = math.inf
    ) -> None:
        """Note which delivered batches have entered an update.

        Args:
            batches: Each with the number of updates that it has entered, this one
                included.
            num_charged: How many draws the accounting of this update covers.
        """
        if self._is_poisson:
            entered = list(batches)
            if any([batch.num_updates > 1 for batch in entered]):
                self._chain.break_link("draw", _USED_TWICE)
                return
            num = len({batch.draw for batch in entered}) if len(entered) > 1 else 1
            if num > num_charged:
                reason = _SEVERAL_DRAWS.format(num=num, charged=num_charged)
                self._chain.break_link("draw", reason)
                return
            if self._is_drawn_again([batch.index_array for batch in entered]):
                self._chain.break_link("draw", _DRAWN_AGAIN)
                return
        if not self._has_checked:
            self._has_checked = True
            self._chain.check("draw", _ONCE if self._is_poisson else _COUNTED)

    def _is_drawn_again(self, parts: list[NDArray[np.int64] | None]) -> bool:
        """Return whether an update has the examples of an earlier one, not by chance.

        Args:
            parts: The indices of each batch that entered it; None: not known.
        """
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not known:
            return False
        indices = known[0] if len(known) == 1 else np.concatenate(known)
        if len(indices) and indices.min() < 0:
            return False  # some examples are not known, or the draw was empty
        num_before = len(self._drawn)
        if self._drawn.add(indices.tobytes()):
            self._evidence = 0.0
            return False
        n, b = self._num_examples, min(len(indices), self._num_examples)
        num_sets = math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(n - b + 1)
        self._evidence += max(0.0, num_sets - math.log(num_before))
        return self._evidence >= _LEAST_EVIDENCE
