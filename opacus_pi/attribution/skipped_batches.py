"""Count the delivered batches that entered no update although later ones did.

A loop may look at a batch, for example at its loss, and go on to the next one without
an update. If that choice depends on the examples, one example decides whether the
others of its batch are used, and it is in more updates than the sampling rate says. The
choice itself cannot be observed, but that batches were skipped can.

*Guarantee.* A batch counts as skipped only if it had samples, no update used it, and an
update used a later batch. Three things that correct loops do are not counted:

* a pass in which no batch was used, such as an evaluation;
* batches at the end of a pass that the loop left early, such as the one at which it
  noticed that it had made enough updates;
* at the end of a complete pass, batches of which gradients were computed (the rest of
  an accumulation), or a last batch that is smaller than the others.

Once a batch was skipped, the batches of unused passes count, too. If the loop draws
each batch from a pass of its own, by ``next(iter(loader))``, so does a pass that it
left without an update. A loop that still holds the pass of its last update does not
draw like this, so a pass that it begins meanwhile is an evaluation, unless it made an
update with an earlier one of these.

*What breaks it.* A loop that chooses when to stop training, or when to leave a pass, by
looking at batches. If a batch was used but not recognised, it counts as skipped; its
samples are unattributed, and the sentence says that they may be of such batches.

>>> skipped = SkippedBatches()
>>> skipped.num
0
"""

from collections.abc import Sequence

from opacus_pi.attribution.delivery import Delivery, LoaderPass

__all__ = ["SkippedBatches"]


class SkippedBatches:
    """The number of skipped batches of a run.

    Attributes:
        num_used: How many batches entered updates.
    """

    def __init__(self) -> None:
        self.num_used = 0
        self._num_skipped = 0
        self._num_in_unused = 0  # of passes without an update
        self._num_at_end = 0  # skipped if another update follows
        self._num_of_pass = 0  # of unused passes, if another update follows
        self._pass: LoaderPass | None = None
        self._is_pass_for_each = False  # whether the loop makes an update a pass
        self._newest_for_one = 0  # the number of the newest such pass

    @property
    def num(self) -> int:
        """Number of batches that were skipped."""
        return self._num_skipped and self._num_skipped + self._num_in_unused

    def delivered(self, delivery: Delivery, recent: Sequence[Delivery]) -> None:
        """Note a delivery.

        Args:
            delivery: The batch.
            recent: The deliveries before it that are remembered, the newest first.
        """
        loader_pass = delivery.loader_pass
        if loader_pass is not self._pass:
            if self._pass is not None:
                self._pass_is_over(self._pass, recent)
            self._pass = loader_pass
        if size := delivery.size:
            loader_pass.num_filled += 1
            loader_pass.first_size = loader_pass.first_size or size
            delivery.place = loader_pass.num_filled

    def _pass_is_over(self, before: LoaderPass, recent: Sequence[Delivery]) -> None:
        """Count the batches that no update used at the end of an earlier pass.

        Args:
            before: The pass.
            recent: The deliveries that are remembered, the newest first.
        """
        is_used = before.last_used > 0
        if is_used:
            self._note_used(before)
        if before.is_under_way or (is_used and not before.has_ended):
            return
        num = before.num_filled - before.last_used
        for delivery in recent:
            if delivery.loader_pass is before and _is_rest(delivery, before):
                delivery.place = 0  # not counted, also if an update uses it later
                num -= 1
        if is_used or (self._is_pass_for_each and not before.has_ended):
            self._num_at_end += num
        else:
            self._num_of_pass += num
        before.last_used = before.num_filled

    def _note_used(self, before: LoaderPass) -> None:
        """Note whether the loop draws each batch from a pass of its own.

        Args:
            before: A pass of which a batch entered an update.
        """
        if before.is_under_way:  # later passes may have been for one update each
            self._is_pass_for_each = before.number < self._newest_for_one
            return
        is_for_one = not before.has_ended and before.num_filled == 1
        if is_for_one:
            self._newest_for_one = before.number
        self._is_pass_for_each = is_for_one

    def entered_update(self, delivery: Delivery) -> None:
        """Note that a batch entered an update, its first one.

        Args:
            delivery: The batch.
        """
        self._num_skipped += self._num_at_end
        self._num_in_unused += self._num_of_pass
        self._num_at_end = self._num_of_pass = 0
        loader_pass, place = delivery.loader_pass, delivery.place
        if not place:
            return
        self.num_used += 1
        if place > loader_pass.last_used:
            self._num_skipped += place - loader_pass.last_used
            loader_pass.last_used = place
        self._num_skipped -= 1


def _is_rest(delivery: Delivery, ended: LoaderPass) -> bool:
    """Return whether a correct loop may leave out this batch at the end of a pass."""
    if delivery.place <= ended.last_used:
        return False
    is_smaller = delivery.size < ended.first_size
    is_last = delivery.place == ended.num_filled
    return delivery.num_forward_passes > 0 or (is_last and is_smaller)
