"""Follow batches from the loader through the model to the optimizer.

A loader reports each batch that it returns, with its data-set indices. A forward pass
of the model is matched to such a delivery, by storage, by content or, unverified, as
the latest batch; when its backward pass has run, its gradients wait for the optimizer.
When an optimizer reports how many samples its gradients come from, the tracker returns
the data-set index of each of them.

*Guarantee.* A sample has an index only if there is evidence for it (``evidence.py``);
where the evidence is an assumption, it is counted as ``by_latest``. Every other sample
is unattributed. Every uncertainty has a cause, which is counted in ``causes`` and
reported in one warning. The numbers of samples must agree: if the passes that wait do
not have the numbers of samples that the gradients have, all samples of the update are
unattributed. A pass whose backward pass has not run is kept by the graph of its outputs
alone, so any number of passes may be accumulated, and those that are never used leave
nothing behind.

*What breaks it.* Gradients that were computed from other tensors than the model's
inputs and outputs (layers called one by one), losses that combine several batches, an
order that is only assumed, and whatever breaks the evidence itself. A batch is
recognised only until 16 others have been delivered. A pass that entered one loss
together with a recognised pass, over as many samples that the loader did not deliver,
is taken to be made of no other examples (cause ``ANOTHER_PASS``); the links "rows" and
"draw" say so.

>>> import torch
>>> tracker = Tracker()
>>> batch = torch.arange(6.0).reshape(3, 2)
>>> _ = tracker.delivered([7, 4, 9], batch)
>>> forward = tracker.bind((batch.clone()[[2, 0]],))
>>> tracker.mark_backward(forward)
>>> tracker.attribute([2])
array([9, 7])
>>> dict(tracker.counts)
{'by_storage': 0, 'by_content': 2, 'by_latest': 0, 'unattributed': 0}
"""

import copy
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from torch import Tensor

from opacus_pi._errors import AccountingError
from opacus_pi._torch_compat import storage_address
from opacus_pi.attribution.causes import (
    ADDED_IN_COLLATE,
    ANOTHER_PASS,
    BESIDE_BATCHES,
    BY_HAND,
    CAUSES,
    CHANGED_IN_PLACE,
    COMPUTED,
    COUPLED,
    CUT_INPUT,
    EQUAL_COPIES,
    EQUAL_INPUTS,
    INPUTS_DISAGREE,
    MIXED,
    MIXED_IN_COLLATE,
    MOVED_AND_CHANGED,
    NO_INDICES,
    NOT_DELIVERED,
    OTHER_BATCHES,
    OWN_BATCHES,
    PARTS_IN_COLLATE,
    PASSES_DISAGREE,
    REPEATED,
    ROWS_IN_MODEL,
    ROWS_OF_OTHERS,
    SHARED_INPUT,
    TAKEN_OVER,
    TRUSTED,
    TWO_TENSORS,
    UNSEEN,
    Cause,
)
from opacus_pi.attribution.collate_identity import (
    BY_CONSTRUCTION,
    NOT_FOLLOWED,
    CollateIdentity,
)
from opacus_pi.attribution.delivery import (
    UNATTRIBUTED,
    Delivery,
    ForwardPass,
    Indices,
    LoaderPass,
    describe_delivery,
)
from opacus_pi.attribution.evidence import assumed, recognised
from opacus_pi.attribution.gradients import with_sizes
from opacus_pi.attribution.input_sizes import InputSizes
from opacus_pi.attribution.inputs_beside import InputsBeside
from opacus_pi.attribution.item_contents import ItemContents
from opacus_pi.attribution.lookalikes import (
    OrderSoFar,
    alike_of,
    charged,
    rows_of_all,
)
from opacus_pi.attribution.model_inputs import SharedRows
from opacus_pi.attribution.other_batches import OtherBatches
from opacus_pi.attribution.rows_of_others import RowsOfOthers
from opacus_pi.attribution.samples import is_dense, tensors_in
from opacus_pi.attribution.skipped_batches import SkippedBatches
from opacus_pi.custody import Chain, SampleCounts
from opacus_pi.models.batches import map_tensors

__all__ = ["EVIDENCE", "Tracker", "indices_of"]

EVIDENCE = ("by_storage", "by_content", "by_latest", "unattributed")
# Deliveries that a forward pass may still be matched to. More would recognise batches
# that a loop keeps longer; each costs a comparison whenever storage does not match.
_MAX_RECENT = 16
_FEW = 4  # forward passes that are remembered although they may exist no longer
_NO_INDICES = np.empty(0, np.int64)
_LEFT_OUT = (
    "The training loop used only a part of some delivered batches. If the loop chose "
    "that part by looking at the examples, for example at their losses, one example "
    "decides whether others are used. No accounting covers that. Choose examples in "
    "the sampler, independently of the data."
)
_DROPPED = (
    "collate_fn left out some of the items that it was given. If it chose them by "
    "looking at the other items, for example to limit the size of a batch, one example "
    "decides whether others are used. No accounting covers that. Choose examples in "
    "the sampler, independently of the data. If an item is left out because of that "
    "item alone, for example because it cannot be read, nothing needs to be done."
)
_UNKNOWN_ROWS = (
    "Some samples of the updates are unattributed. They are charged as if no example "
    "had two samples in an update, and none of them held data of several examples. "
    "That holds for generated samples. It does not hold where an example enters an "
    "update several times, as two views, windows or the choices of a question."
)
_UNKNOWN_DRAWS = (
    "Some samples of the updates are unattributed. They are charged as if the loader "
    "had drawn every example that they hold data of for the same update. That holds "
    "for generated samples. It does not hold for batches of another loader."
)
_UNCOUNTED_PASS = (
    "The loss also used a forward pass over inputs that the data loader did not "
    "deliver. If they are examples of the training set, as another loader or a memory "
    "of earlier batches has them, these participations are not counted, and the "
    "privacy loss is larger than recorded. Train on the batches of the loader that "
    "make_private returned. If they are generated, public, or computed from the same "
    "batch, every participation is counted."
)
_COUPLED_INPUT = (
    "The loop computed inputs of the model. It is assumed that each was computed from "
    "one example. " + COUPLED
)
_UNSEEN_MODEL = (
    "For some gradients no forward pass of the model in training mode was seen, as if "
    "its layers were called one by one. So it was not checked that what the loop "
    "computed for one example depends on that example only."
)
_SKIPPED = (
    "{num} of {total} batches that the loader delivered entered no update, and later "
    "ones did. If the loop chose its batches by looking at the examples, for example "
    "at their losses, one example decides whether the others of its batch are used, "
    "and it is in more updates than the sampling rate says. No accounting covers that. "
    "Make one update with each delivered batch. If the choice did not depend on the "
    "data, nothing needs to be done."
)
_UNRECOGNISED = (
    "{num} of {total} batches that the loader delivered were not recognised in any "
    "update, and later ones were. Their samples may be among the unattributed "
    "ones. If the loop left these batches out, and chose them by looking at the "
    "examples, one example decides whether the others of its batch are used. No "
    "accounting covers that. Give the model the tensors that the data loader delivered."
)
_WITHDRAWN = (
    "{num} samples of earlier updates were assumed to be the latest batch in its "
    "order. Later the loop gave the model examples of other batches, or other inputs "
    "beside a batch, or moved samples. So their norms may be charged to the wrong "
    "examples."
)
# Causes that show that a loop gives the model other inputs beside its batches.
_OTHERS = frozenset(c.name for c in (ANOTHER_PASS, BESIDE_BATCHES, NOT_DELIVERED))
_BREAKING = (
    INPUTS_DISAGREE,
    MIXED,
    MIXED_IN_COLLATE,
    PARTS_IN_COLLATE,
    PASSES_DISAGREE,
    ROWS_IN_MODEL,
    TWO_TENSORS,
)
_EVIDENCE = {
    "identity": "Samples were recognised by their memory or their content.",
    "rows": "All inputs of each forward pass had the same examples in the same order.",
}
# Attributes of a tracker that its copies and pickles have.
_COPIED = ("verify", "strict", "batch_dim", "counts", "causes")
_CONSEQUENCES = {
    "unattributed": "{num} samples are unattributed. ",
    "unchecked": "Samples are attributed without verification. ",
    "largest": "",
    "repeated": "",
    "beside": "",
}


class Tracker:
    """Attribution of the samples of physical batches to examples of the data set.

    Args:
        verify: Whether copies of the delivered tensors are recognised by content.
        strict: Whether a sample that is not attributed for certain is an error.
        batch_first: Whether samples are along the first dimension of the model's
            inputs; otherwise they are along the second.

    Attributes:
        counts: How many samples were attributed, by evidence.
        num_left_out: Of the batches that the loop used, the number of samples that it
            did not use.
        has_additions: Whether ``collate_fn`` returned more than its items.
        has_dropped: Whether ``collate_fn`` left out items.
        contents: What each index of the data set contained when it was first delivered.
        indexes_plainly: Whether the data set is known to keep the order of its
            examples, however it changes them.
        loads_batches: Whether the data set has a ``__getitems__`` of its own.
        keeps_batches: Whether copies of the recent batches are kept in memory.
        looks_at_batch: Called with each delivery and its batch; returns whether a copy
            of the batch is kept. None: not called.
        saw_pass: Called with each forward pass and its outputs; None: not called.
        saw_backward: Called during each backward pass, with whether it is the second
            one of ghost clipping (``is_second``).
        forgot_passes: Called when gradients were cleared that no update had used.
        is_between_backwards: Whether a loss of ghost clipping runs its two backward
            passes; between them it clears the gradients itself.
        is_taken_over: Whether the model reports its passes to a later run.
        keeps_outputs: Whether the addresses of outputs are noted, for ``is_output``, of
            a model with a single output, too.
        causes: How many samples were uncertain, by the name of the cause. A sample may
            have several causes. ``explanation`` has the sentences.
    """

    def __init__(
        self, *, verify: bool = True, strict: bool = False, batch_first: bool = True
    ) -> None:
        self.verify, self.strict = verify, strict
        self.batch_dim = 0 if batch_first else 1
        self.counts = dict.fromkeys(EVIDENCE, 0)
        self.keeps_batches = self.keeps_outputs = False
        self.indexes_plainly = self.loads_batches = False
        self.is_between_backwards = self.is_taken_over = False
        self.looks_at_batch: Callable[[Delivery, Any], bool] | None = None
        self.saw_pass: Callable[[ForwardPass, Any], None] | None = None
        self.saw_backward: list[Callable[..., None]] = []
        self.forgot_passes: list[Callable[[], None]] = []
        self.num_left_out = 0
        self._skipped, self._said_skipped = SkippedBatches(), ""
        self.has_additions = self.has_dropped = False
        self.causes: dict[str, int] = {}
        self._recent: deque[Delivery] = deque()
        self._default_pass = LoaderPass()
        # Passes whose gradients no optimizer has taken yet. A pass whose backward pass
        # has not run is kept by the graph of its outputs alone, and goes with them.
        self._pending: list[ForwardPass] = []
        self._bound: deque[weakref.ref[ForwardPass]] = deque(maxlen=_MAX_RECENT)
        self._beside = InputsBeside(self.batch_dim)
        self._sizes = InputSizes(self.batch_dim)
        self._others = RowsOfOthers(self.batch_dim)
        self._shared_rows, self._order = SharedRows(), OrderSoFar()
        self._num_differing: Tensor | int = 0  # copies, not read yet
        self.contents = ItemContents()
        self._entered: list[Delivery] = []
        self._num_backward = 0
        # Samples of whole batches that are assumed, and those that were until then.
        self._num_computed = self._num_withdrawn = 0
        self._other_batches = OtherBatches()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: options and counts, and no batches.

        Batches are recognised by the memory that they are stored in, and nothing in a
        copy is stored there. Nor may torch's references to this memory be copied: each
        copy would free the same one.
        """
        blank = Tracker()
        for name in _COPIED:
            setattr(blank, name, copy.copy(getattr(self, name)))
        return vars(blank)

    @property
    def latest(self) -> Delivery | None:
        """The batch that was delivered last."""
        return self._recent[0] if self._recent else None

    # ------------------------------------------------------- what the loader reports
    def delivered(
        self,
        indices: Any,
        batch: Any,
        loader_pass: LoaderPass | None = None,
        *,
        identity: CollateIdentity = BY_CONSTRUCTION,
    ) -> Delivery:
        """Record that a loader returns a batch to the training loop.

        Args:
            indices: What its sampler returned for it: indices, or one index.
            batch: Tensors in any nesting of lists, tuples and dicts.
            loader_pass: The pass over a loader that it belongs to; default: one that
                all such calls share.
            identity: Which item each sample is, if ``collate_fn`` was observed.

        Returns:
            The description of the batch.
        """
        delivery = describe_delivery(
            indices,
            batch,
            loader_pass or self._default_pass,
            batch_dim=self.batch_dim,
            verify=self.verify,
            identity=identity,
        )
        self.has_additions |= identity.has_more
        self.has_dropped |= identity.num_left_out > 0
        self._compare_contents(delivery)
        looks = self.looks_at_batch
        is_kept = looks is not None and looks(delivery, batch)
        if is_kept or self.keeps_batches:
            delivery.batch = _copy_of(batch)
        delivery.loader_pass.num_unused += 1
        self._skipped.delivered(delivery, self._recent)
        self._recent.appendleft(delivery)
        if len(self._recent) > _MAX_RECENT:
            self._recent.pop().release()
        return delivery

    def _compare_contents(self, delivery: Delivery) -> None:
        """Leave samples unattributed whose content another index had before.

        Args:
            delivery: The batch.
        """
        indices = delivery.index_array
        if indices is None or not len(indices) or delivery.identity is NOT_FOLLOWED:
            return
        identity = delivery.identity
        sums, labels_of = identity.contents, partial(_labels_of, delivery)
        if sums is not None:
            sums = sums if identity.items is None else sums[identity.items]
        elif identity.items is None and not identity.notes:
            sums = delivery.contents()
        if sums is None or len(sums) != len(indices):
            return
        if not delivery.are_distinct:  # nearly always they are
            (places,) = (indices >= 0).nonzero()
            indices, sums = indices[places], sums[places]
            labels_of = partial(_labels_of, delivery, places)
            moved = places[self.contents.moved(indices, sums, labels_of)]
        else:
            (moved,) = self.contents.moved(indices, sums, labels_of).nonzero()
        if len(moved):
            delivery.leave_unattributed(moved, self.contents.cause())

    # ------------------------------------------------------- what the model reports
    def bind(self, inputs: Any) -> ForwardPass:
        """Match a forward pass in training mode to a delivery.

        Args:
            inputs: The model's arguments, nested as they are.

        Returns:
            The pass, which waits for its backward pass and for an optimizer.
        """
        return self.bind_tensors(tensors_in(inputs))

    def bind_tensors(self, inputs: list[Tensor]) -> ForwardPass:
        """Match a forward pass in training mode to a delivery, as ``bind`` does.

        Args:
            inputs: The dense tensors among the model's arguments.
        """
        forward = self._match(inputs)
        if forward.delivery is not None:
            forward.delivery.use(is_recognised=forward.is_recognised)
        if len(self._bound) > _FEW:
            present = [bound for bound in self._bound if bound() is not None]
            self._bound = deque(present, maxlen=_MAX_RECENT)
        self._bound.append(weakref.ref(forward))
        return forward

    def saw_call(
        self,
        forward: ForwardPass,
        given: list[Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Look for inputs of a pass that may depend on other examples.

        They have no row for each example, sizes that the loop computed, or entries of
        other examples.

        Args:
            forward: The pass.
            given: The dense tensors among its inputs.
            args: Its positional inputs.
            kwargs: Its inputs by keyword.
        """
        if self._beside.saw(forward, given, args, kwargs, self.awaiting_backward):
            forward.notes = (*forward.notes, SHARED_INPUT)
        if self._sizes.saw(forward, given):
            forward.notes = (*forward.notes, CUT_INPUT)
        has_moved = self._order.has_moved
        if self._others.saw(forward, given, self._recent, has_moved=has_moved):
            forward.notes = (*forward.notes, ROWS_OF_OTHERS)

    def awaiting_backward(self) -> list[ForwardPass]:
        """Return the recent passes from which a loss may still be computed."""
        passes = [bound() for bound in self._bound]
        return [f for f in passes if f is not None and not f.backward]

    def _match(self, inputs: list[Tensor]) -> ForwardPass:
        """Find the strongest evidence for which samples these inputs are.

        Args:
            inputs: The tensors among the model's arguments.
        """
        dim, recent = self.batch_dim, self._recent
        tensors = [t for t in inputs if t.ndim > dim]
        found = recognised(
            tensors,
            dim,
            recent,
            verify=self.verify,
            shared_rows=self._shared_rows,
            order=self._order,
        )
        if found is None:
            found = assumed(
                tensors,
                dim,
                recent,
                has_others=self.verify and not self.causes.keys().isdisjoint(_OTHERS),
                has_moved=self._order.has_moved,
            )
        is_assumed = found.evidence == "by_latest" or found.is_assumed is not None
        if not (is_assumed and self.verify and found.cause is COMPUTED):
            return found
        if not self._other_batches.are_given(tensors, dim, found, self.contents):
            return found
        num = found.num_samples
        return ForwardPass(
            None, "", None, OTHER_BATCHES, num_inputs=num, latest=recent[0]
        )

    def mark_backward(self, forward: ForwardPass, *, clipping: bool = False) -> None:
        """Record that the backward pass has reached the output of a forward pass.

        Args:
            forward: The forward pass.
            clipping: Whether it was the second backward pass of ghost clipping.
        """
        self._num_backward += 1
        if not forward.backward:
            self._pending.append(forward)
        forward.backward = self._num_backward
        forward.clipped |= clipping
        for saw_backward in self.saw_backward:
            saw_backward(is_second=clipping)

    # --------------------------------------------------- what the optimizer reports
    def discard(self, *, clipped_only: bool = False) -> int:
        """Forget the passes whose gradients were cleared, for example by ``zero_grad``.

        Passes whose backward pass has not run yet have no gradients, and stay.

        Args:
            clipped_only: Forget only those whose clipped gradient was complete.

        Returns:
            How many passes were forgotten.
        """
        if not self._pending:  # nearly always
            return 0
        gone = [f for f in self._pending if f.clipped or not clipped_only]
        kept = [f for f in self._pending if clipped_only and not f.clipped]
        if not gone:
            return 0
        for forward in gone:
            if forward.is_recognised and forward.delivery is not None:
                forward.delivery.num_recognised -= 1
        self._keep(kept)
        for forgot in self.forgot_passes:
            forgot()
        return len(gone)

    def _keep(self, kept: list[ForwardPass]) -> None:
        """Keep these passes as done; let the others wait for a backward pass again."""
        for forward in self._pending:
            if not kept or forward not in kept:
                forward.backward = 0
        self._pending = kept

    def take(self, *, clipped_only: bool = False) -> list[ForwardPass]:
        """Pop the forward passes whose backward pass has run, in backward order.

        Their deliveries enter the update that ``end_update`` completes.

        Args:
            clipped_only: Return only complete passes of ghost clipping; the others are
                forgotten.
        """
        done = self._pending
        self._keep([])
        if len(done) > 1:
            done = sorted(done, key=_backward_order)
        if clipped_only:
            done = [forward for forward in done if forward.clipped]
        for forward in done:
            if forward.delivery is not None:
                self._entered.append(forward.delivery)
                forward.delivery.num_samples_used += forward.num_samples or 0
        return done

    def end_update(self) -> list[Delivery]:
        """Count one more update for each delivery that entered it, once for each.

        Returns:
            These deliveries.
        """
        distinct, self._entered = self._entered, []
        if len(distinct) > 1:
            distinct = list({id(delivery): delivery for delivery in distinct}.values())
        self._note_left_out(distinct)
        for delivery in distinct:
            if not delivery.num_updates:
                self._skipped.entered_update(delivery)
            delivery.num_updates += 1
        return distinct

    def _note_left_out(self, entered: list[Delivery]) -> None:
        """Count the samples of delivered batches that the loop did not use.

        Args:
            entered: The deliveries of an update.
        """
        for delivery in entered:
            before = delivery.num_left
            left = delivery.size - delivery.num_samples_used
            delivery.num_left = left if left > 0 else 0
            self.num_left_out += delivery.num_left
            if delivery.num_updates:  # it was counted when it entered an update before
                self.num_left_out -= before

    def delivery_of_gradients(self) -> Delivery | None:
        """Return the batch that all present gradients come from, if it is only one."""
        found = {id(f.delivery): f.delivery for f in self._pending}
        return next(iter(found.values())) if len(found) == 1 else None

    def passes_of_gradients(self) -> list[ForwardPass]:
        """Return the passes whose gradients no optimizer has taken yet."""
        return list(self._pending)

    def bind_gradients(self, gradients: Any) -> None:
        """Match per-example gradients that no backward pass has computed.

        A loop may compute them by hand. They are then assumed to be of the latest
        batch, like inputs that the loop computed anew.

        Args:
            gradients: A tensor ``(b, ...)`` with one gradient for each sample.
        """
        if not self._pending:
            forward = assumed(
                tensors_in(gradients),
                0,
                self._recent,
                is_view=True,
                cause=BY_HAND,
            )
            if forward.delivery is not None:
                forward.delivery.use(is_recognised=False)
            self.mark_backward(forward)

    def awaits_second_backward(self) -> bool:
        """Return whether a pass waits for the second backward pass (ghost clipping)."""
        return any([not f.clipped for f in self._pending])

    def ends_unclipped(self) -> bool:
        """Return whether nothing has clipped in the newest backward pass (ghost).

        Gradients of earlier ones are cleared by the passes that clip.
        """
        newest = max(self._pending, key=lambda f: f.backward, default=None)
        return newest is not None and not newest.clipped

    # --------------------------------------------------------------- what it answers
    def attribute(
        self,
        sizes: Sequence[int],
        *,
        norms: Tensor | None = None,
        clipped_only: bool = False,
    ) -> Indices:
        """Return the data-set indices of the samples that enter the update.

        Args:
            sizes: How many samples each backward pass since the last call had.
            norms: Norms of all samples, ``(sum(sizes),)``, which show whether copies
                of one example have different gradients; None: not known.
            clipped_only: Whether only complete passes of ghost clipping count.

        Returns:
            int64 ``(sum(sizes),)``; ``UNATTRIBUTED`` or ``LEFT_OUT`` in place of an
            index where there is none, as for samples that cannot be distinguished.

        Raises:
            AccountingError: If the tracker is strict and a sample is uncertain.
        """
        passes = self.take_attributed(sizes, clipped_only=clipped_only)
        indices, unclear = indices_of(passes), alike_of(passes)
        differ = None if norms is None else charged(norms, passes).differ
        if differ is not None:
            self._note_copies(differ)
            unclear = np.append(unclear, np.flatnonzero(differ.cpu().numpy()))
        if len(unclear):
            indices = indices.copy()
            indices[unclear] = UNATTRIBUTED
        return indices

    def charged(self, norms: Tensor, passes: Sequence[ForwardPass]) -> Tensor:
        """Charge samples whose order is not known the largest of their norms.

        Args:
            norms: Norms of all samples, ``(b,)``.
            passes: The passes that ``take_attributed`` returned for them.

        Returns:
            ``(b,)``; the same tensor if there are no such samples.

        Raises:
            AccountingError: If the tracker is strict, and copies of one example have
                different norms.
        """
        found = charged(norms, passes)
        if found.differ is not None:
            self._note_copies(found.differ)
        return found.norms

    def _note_copies(self, differ: Tensor) -> None:
        """Count copies with different norms, on an accelerator without reading them.

        Args:
            differ: Which samples are such copies, bool ``(b,)``.
        """
        self._num_differing = self._num_differing + differ.sum()
        if differ.is_cpu or self.strict:
            self._read_copies()

    def _read_copies(self) -> None:
        """Count the copies with different norms that were found up to now."""
        num, self._num_differing = int(self._num_differing), 0
        if num:
            self._note(EQUAL_COPIES, num)

    def take_attributed(
        self, sizes: Sequence[int], *, clipped_only: bool = False
    ) -> list[ForwardPass]:
        """Pop the passes whose samples enter the update, and count their samples.

        This is ``attribute`` without the array of indices: a pass over a whole batch,
        which is the usual case, has its indices as a list already.

        Args:
            sizes: How many samples each backward pass since the last call had.
            clipped_only: Whether only complete passes of ghost clipping count.

        Returns:
            One pass for each size, all with indices.

        Raises:
            AccountingError: If the tracker is strict and a sample is uncertain.
        """
        unseen = TAKEN_OVER if self.is_taken_over else UNSEEN
        passes = with_sizes(self.take(clipped_only=clipped_only), list(sizes), unseen)
        for forward in passes:
            self._count(forward)
        return passes

    def sample_counts(self) -> SampleCounts:
        """Count the samples that entered updates, and those that are unattributed."""
        found = (CAUSES[name] for name in self.causes)
        reasons = [c.explanation for c in found if c.state == "unattributed"]
        unattributed = self.counts["unattributed"]
        total = sum(self.counts.values())
        return SampleCounts(total, unattributed, " ".join(reasons))

    def is_output(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in the memory of an output of the model.

        Args:
            tensor: A tensor, for example an argument of the criterion. A single output
                is noted only while ``keeps_outputs`` is true.
        """
        if not is_dense(tensor):
            return False
        address = storage_address(tensor.untyped_storage())
        return any(address in f.output_storages for f in self.awaiting_backward())

    def report_to(self, chain: Chain) -> None:
        """Report to the links "identity" and "rows" what was found up to now.

        Inputs with different examples in one position, or mixtures of several, break
        the link, however few they are: clipping then does not bound what one example
        contributes.

        Args:
            chain: The chain of custody of the run.
        """
        if sum(self.counts.values()):
            for link in ("identity", "rows"):
                chain.check(link, _EVIDENCE[link])
        self._note_doubtful_inputs()
        self._read_copies()
        self._report_unknown(chain)
        self._report_other_inputs(chain)
        self.report_left_out(chain)
        self._report_skipped(chain)
        if self.has_additions:
            added = ADDED_IN_COLLATE
            chain.leave_unchecked(added.link, added.explanation, warn=False)
        doubt = None if self.indexes_plainly else self.contents.doubt()
        if doubt is None and self.loads_batches:
            if self.contents.num_same:
                chain.settle("identity", OWN_BATCHES.explanation)
            else:
                doubt = OWN_BATCHES
        if doubt is not None:
            chain.leave_unchecked("identity", doubt.explanation, warn=doubt.is_said)
        if self._order.is_doubtful or (
            self._order.are_copies_doubtful and EQUAL_COPIES.name in self.causes
        ):
            chain.leave_unchecked("identity", TRUSTED.explanation, warn=False)
        for cause in (CAUSES[name] for name in self.causes):
            if cause in _BREAKING:
                chain.break_link("rows", cause.explanation)
            elif cause.state != "repeated":
                chain.leave_unchecked(cause.link, cause.explanation, warn=False)

    def _note_doubtful_inputs(self) -> None:
        """Note inputs that may depend on other examples, if no update has yet."""
        num = sum(self.counts.values())
        if SHARED_INPUT.name not in self.causes and self._beside.doubtful_at_end():
            self._note(SHARED_INPUT, num)
        if CUT_INPUT.name not in self.causes and self._sizes.are_doubtful:
            self._note(CUT_INPUT, num)
        if ROWS_OF_OTHERS.name not in self.causes and self._others.are_found:
            self._note(ROWS_OF_OTHERS, num)

    def _report_unknown(self, chain: Chain) -> None:
        """Report what is assumed of samples whose example is not known."""
        if self.counts["unattributed"]:
            chain.leave_unchecked("rows", _UNKNOWN_ROWS, warn=False)
            chain.leave_unchecked("draw", _UNKNOWN_DRAWS, warn=False)
        if num := self._num_withdrawn:
            sentence = _WITHDRAWN.format(num=num)
            chain.leave_unchecked("identity", sentence, warn=False)
        if UNSEEN.name in self.causes:
            chain.leave_unchecked("model", _UNSEEN_MODEL, warn=False)

    def _report_other_inputs(self, chain: Chain) -> None:
        """Report what is assumed of inputs that the data loader did not deliver."""
        if ANOTHER_PASS.name in self.causes:
            chain.leave_unchecked("draw", _UNCOUNTED_PASS)
        if any(cause.name in self.causes for cause in (COMPUTED, CHANGED_IN_PLACE)):
            chain.leave_unchecked("rows", _COUPLED_INPUT, warn=False)

    def report_left_out(self, chain: Chain) -> None:
        """Report that the loop or ``collate_fn`` left out a part of a batch.

        Args:
            chain: The chain of custody of the run.
        """
        latest = 0 if self.latest is None else self.latest.num_left  # perhaps to come
        if self.num_left_out > latest:
            chain.leave_unchecked("draw", _LEFT_OUT, warn=False)
        if self.has_dropped:
            chain.leave_unchecked("draw", _DROPPED, warn=False)

    def _report_skipped(self, chain: Chain) -> None:
        """Report how many delivered batches entered no update; warn of it once."""
        num, before = self._skipped.num, self._said_skipped
        if not num:
            return
        sentence = _UNRECOGNISED if self.counts["unattributed"] else _SKIPPED
        sentence = sentence.format(num=num, total=num + self._skipped.num_used)
        self._said_skipped = sentence
        chain.leave_unchecked(
            "draw", sentence, warn=not before, instead_of=before or None
        )

    def _count(self, forward: ForwardPass) -> None:
        """Count the samples of a pass by evidence and by cause.

        Args:
            forward: A pass with indices.
        """
        distinct, evidence = forward.distinct_indices(), forward.evidence
        self._other_batches.entered_update |= forward.cause is OTHER_BATCHES
        if self._num_computed:
            self._withdraw_guesses(forward)
        if distinct is not None and evidence == "by_storage" and not forward.notes:
            self.counts[evidence] += len(distinct)  # nearly always
            return
        indices = cast(Indices, forward.indices) if distinct is None else _NO_INDICES
        num_known = len(distinct or ()) + int(np.count_nonzero(indices >= 0))
        num_unknown = int(np.count_nonzero(indices == UNATTRIBUTED))
        num_assumed = 0
        if forward.evidence == "by_latest":
            num_assumed = num_known
            if forward.cause is COMPUTED and forward.delivery is not None:
                forward.delivery.was_assumed = True
                self._num_computed += num_assumed
        elif forward.is_assumed is not None:
            num_assumed = int(np.count_nonzero((indices >= 0) & forward.is_assumed))
        causes = Counter(dict.fromkeys(forward.notes, num_known))
        causes.update(forward.unattributed)
        num_explained = sum(forward.unattributed.values())
        causes[forward.cause or NO_INDICES] += num_unknown - num_explained
        causes[forward.cause or COMPUTED] += num_assumed
        causes[REPEATED] += _num_repeated(indices)
        causes[EQUAL_INPUTS] += len(rows_of_all(forward.alike))
        self.counts["unattributed"] += num_unknown
        self.counts["by_latest"] += num_assumed
        if num_known > num_assumed:
            self.counts[forward.evidence] += num_known - num_assumed
        for cause, num in causes.items():
            if num:
                self._note(cause, num)

    def _withdraw_guesses(self, forward: ForwardPass) -> None:
        """Withdraw the assumption that inputs were computed from the latest batch.

        A pass contradicts it if it shows that the loop moves samples or trains on other
        batches, or that an earlier update was assumed to be of this batch. Samples that
        were assumed before then count as unattributed.

        Args:
            forward: A pass that enters an update.
        """
        if forward.cause is OTHER_BATCHES:
            cause = OTHER_BATCHES
        elif not forward.is_recognised or forward.delivery is None:
            return
        elif forward.delivery.was_assumed:
            cause = BESIDE_BATCHES
        elif self._order.has_moved:
            cause = MOVED_AND_CHANGED
        else:
            return
        num, self._num_computed = self._num_computed, 0
        self._num_withdrawn += num
        self.causes[COMPUTED.name] -= num
        if not self.causes[COMPUTED.name]:
            del self.causes[COMPUTED.name]
        self.counts["by_latest"] -= num
        self.counts["unattributed"] += num
        self._note(cause, num)

    def _note(self, cause: Cause, num: int) -> None:
        """Count samples with a cause, and warn of it once, or raise if strict.

        Args:
            cause: Why the samples are uncertain.
            num: How many they are.
        """
        is_new = cause.name not in self.causes
        self.causes[cause.name] = self.causes.get(cause.name, 0) + num
        if not cause.is_said:
            return
        message = _CONSEQUENCES[cause.state].format(num=num) + cause.explanation
        if self.strict:
            raise AccountingError(message)
        if is_new:
            warnings.warn(message, stacklevel=2)

    @staticmethod
    def explanation(cause: str) -> str:
        """Return what a cause means and what to do about it, in sentences.

        Args:
            cause: A name that ``causes`` has.
        """
        return CAUSES[cause].explanation


def indices_of(passes: list[ForwardPass]) -> Indices:
    """Return the indices of several passes, one after another; of one pass no copy."""
    parts = [cast(Indices, forward.indices) for forward in passes]
    return parts[0] if len(parts) == 1 else np.concatenate([_NO_INDICES, *parts])


def _labels_of(delivery: Delivery, places: Indices | None = None) -> Indices | None:
    """Return checksums of the labels of some samples of a batch, or of all.

    Args:
        delivery: The batch.
        places: Positions of the samples; None: all of them.
    """
    identity = delivery.identity
    labels = identity.labels
    if identity.contents is None:
        labels = delivery.labels()
    elif labels is not None and identity.items is not None:
        labels = labels[identity.items]
    return labels if labels is None or places is None else labels[places]


def _num_repeated(indices: Indices) -> int:
    """Count the samples whose example is in the pass already."""
    known = np.sort(indices[indices >= 0])
    return int(np.count_nonzero(known[1:] == known[:-1]))


def _backward_order(forward: ForwardPass) -> int:
    """Return when the backward pass reached a forward pass; a key for sorting."""
    return forward.backward


def _copy_of(batch: Any) -> Any:
    """Return a batch with copies of its tensors, which the loop cannot change."""
    parts = dict(batch) if isinstance(batch, Mapping) else batch
    return map_tensors(Tensor.clone, parts)
