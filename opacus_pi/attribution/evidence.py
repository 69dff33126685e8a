"""Recognise the samples that a model was given: by storage, content or latest batch.

Between the loader and the model the training loop may do anything: copy a batch, cut
it, permute it, write to it, put it aside. Each input of the model is compared with the
recent deliveries: first by its memory, and where that does not match by the checksums
of its samples. A sample gets the data-set index on which all inputs agree. A sample for
which they disagree is unattributed; nothing is guessed.

*Guarantee.* A sample counts as recognised only if its memory is that of a delivered
sample and the entries that are compared are as they were at delivery, or if its
checksum is that of one delivered sample. Every input that is recognised must have the
same example in the same position. ``assumed`` verifies nothing. It assumes that inputs
that were not recognised are the latest batch, in its order. It does so only if no other
batch is waiting to be used, the latest batch itself was not given to the model, and the
loop has neither moved samples nor given the model other inputs beside a batch.

*What breaks it.* Of a sample with more than 512 entries, 256 to 512 are compared, in
drawn places. A change of a share f of its entries, made without knowing these places,
is missed with a probability of at most ``(1 - f)**256``; a permutation of samples that
differ in most entries is not missed. On an accelerator, content of delivered memory is
compared where torch has counted a write, and in one of 32 batches: a write through
``.data`` to the memory of single other batches is missed. Masks and positions say
nothing about the order of examples unless the loader delivered them; of inputs with one
number a sample, see :mod:`~opacus_pi.attribution.own_numbers`. A loop that permutes
samples and also computes new inputs from them is attributed wrongly where the order is
assumed; such samples are counted as ``by_latest``.
"""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.causes import (
    ALIKE,
    ANOTHER_INPUT,
    BESIDE_BATCHES,
    CHANGED_IN_PLACE,
    COMPUTED,
    EQUAL_NUMBERS,
    INPUTS_DISAGREE,
    MOVED_AND_CHANGED,
    NO_DELIVERY,
    NO_INDICES,
    NOT_DELIVERED,
    OTHER_SIZE,
    SEVERAL_BATCHES,
    UNTRACED,
    VALUES_MOVED,
    Cause,
)
from opacus_pi.attribution.delivery import (
    UNATTRIBUTED,
    Delivery,
    ForwardPass,
    Indices,
)
from opacus_pi.attribution.lookalikes import (
    LOOKS_ALIKE,
    UNKNOWN,
    Alike,
    OrderSoFar,
    rows_of_all,
    settled,
)
from opacus_pi.attribution.mixtures import are_near_own
from opacus_pi.attribution.model_inputs import (
    Finding,
    Input,
    SharedRows,
    lost_order,
)
from opacus_pi.attribution.own_numbers import are_own
from opacus_pi.attribution.samples import DelayedChecksums

__all__ = ["assumed", "recognised"]


# ------------------------------------------------------------------ all inputs together
def recognised(
    tensors: list[Tensor],
    dim: int,
    recent: Sequence[Delivery],
    *,
    verify: bool,
    shared_rows: SharedRows | None = None,
    order: OrderSoFar | None = None,
) -> ForwardPass | None:
    """Attribute samples whose memory or content is that of a delivered sample.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the samples.
        recent: Deliveries, the newest first. Those without indices are left out.
        verify: Whether samples are recognised by content.
        shared_rows: The earlier inputs whose samples were all alike. None: such inputs
            are assumed to be masks or tables.
        order: What earlier passes have shown about the order of samples. None: nothing.

    Returns:
        A pass with the index of each sample that is recognised, and causes for the
        others; None if no sample is recognised.
    """
    order = order or OrderSoFar()
    is_kept = bool(recent) and not order.moves_in_place
    if is_kept and _are_whole_batch(tensors, dim, recent[0]):
        return ForwardPass.of_whole_delivery(recent[0], "by_storage")
    recent = [d for d in recent if d.indices is not None]
    inputs = [Input(tensor, dim) for tensor in tensors]
    for given in inputs:
        given.look(recent, verify=verify, moves_in_place=order.moves_in_place)
    if verify and shared_rows is not None and len(inputs) > 1:
        shared_rows.saw(inputs)
    deciding = _deciding(inputs, verify=verify)
    return _of_inputs(inputs if verify else [], deciding, recent, order)


def _of_inputs(
    inputs: list[Input],
    deciding: list[Input],
    recent: list[Delivery],
    order: OrderSoFar,
) -> ForwardPass | None:
    """Return the pass that inputs show; None if none of them shows anything.

    Args:
        inputs: The inputs that must not contradict, compared with the deliveries.
        deciding: Those that show which samples they are.
        recent: Deliveries with indices, the newest first.
        order: What earlier passes have shown about the order of samples.
    """
    if not deciding:
        return None
    delivery = _explaining(deciding, recent)
    sizes = {len(given) for given in deciding}
    if delivery is None or len(sizes) > 1:
        cause = SEVERAL_BATCHES if delivery is None else INPUTS_DISAGREE
        return ForwardPass(None, "", None, cause, num_inputs=max(sizes))
    beside = [g for g in inputs if g not in deciding and len(g) == len(deciding[0])]
    return _agreed(deciding, beside, delivery, recent, order)


def _deciding(inputs: list[Input], *, verify: bool) -> list[Input]:
    """Return the inputs that show which samples they are.

    Masks and tables count only if no other input was recognised, and only if all of
    their samples were.

    Args:
        inputs: The model's inputs, compared with the deliveries.
        verify: Whether samples are recognised by content.
    """
    strong = [given for given in inputs if not (verify and given.is_pattern)]
    deciding = [given for given in strong if given.findings] or [
        given for given in inputs if any(f.is_whole for f in given.findings)
    ]
    if deciding or not verify:
        return deciding
    wide = [given for given in inputs if given.content.width > 1]
    are_explained = all(
        any(f.num_explained == len(given) for f in given.findings) for given in wide
    )
    return wide if are_explained else []


def _are_whole_batch(tensors: list[Tensor], dim: int, latest: Delivery) -> bool:
    """Return whether all inputs are tensors of the latest batch, untouched.

    This is what nearly every loop does, and it needs no array of indices.
    """
    if not tensors or not latest.are_distinct:
        return False
    for tensor in tensors:
        for delivered in latest.tensors:
            if delivered.is_whole(tensor, dim):
                break
        else:
            return False
    return True


def _explaining(inputs: list[Input], recent: list[Delivery]) -> Delivery | None:
    """Return the delivery that all inputs come from; None if there are several.

    Args:
        inputs: Inputs with findings: the samples of a delivery that were recognised in
            them.
        recent: Deliveries, the newest first. Of two that explain equally much, such as
            batches that have the same examples, the newer one is returned.
    """

    def score(delivery: Delivery) -> tuple[int, int]:
        known = [f for given in inputs if (f := given.finding_in(delivery))]
        return len(known), sum(f.num_explained for f in known)

    best = max(recent, key=score)
    for given in inputs:
        own = given.finding_in(best)
        missing = np.ones(len(given), np.bool_) if own is None else ~own.is_explained
        if any((missing & f.is_known).any() for f in given.findings):
            return None
    return best


def _agreed(
    deciding: list[Input],
    beside: list[Input],
    delivery: Delivery,
    recent: list[Delivery],
    order: OrderSoFar,
) -> ForwardPass:
    """Return the pass whose samples are those on which all inputs agree.

    Args:
        deciding: The inputs that show which samples they are.
        beside: Inputs with the same number of samples that do not show which samples
            they are.
        delivery: The delivery that explains the inputs.
        recent: Deliveries, the newest first.
        order: What earlier passes have shown about the order of samples.
    """
    found = [f for given in deciding if (f := given.finding_in(delivery)) is not None]
    positions, disagree = _joined(found, cast(Indices, delivery.index_array))
    positions, alike, copies = _in_order(found, positions, [*deciding, *beside], order)
    is_clear = np.ones(len(positions), np.bool_)
    is_clear[rows_of_all(alike)] = False
    moved = [_is_of_others(given, positions, delivery) & is_clear for given in beside]
    disagree |= np.any(moved, axis=0)
    rest = positions < 0
    places, cause = _assumed_places(found, rest, deciding, order)
    is_assumed = rest if places is not None and rest.any() else None
    positions = positions if places is None else np.where(rest, places, positions)
    indices = _at(cast(Indices, delivery.index_array), positions)
    unattributed = _causes_of(found, positions < 0)
    for which, reason in (
        ((positions >= 0) & (indices == UNATTRIBUTED), delivery.identity.cause),
        (disagree & (indices != UNATTRIBUTED), INPUTS_DISAGREE),
        (_is_ambiguous(deciding, delivery, indices, recent) & ~disagree, ALIKE),
    ):
        unattributed[reason] += int(np.count_nonzero(which))
        indices = np.where(which, UNATTRIBUTED, indices)
    is_unseen = any(
        not (
            which.any()
            or _is_explained(given, positions, [*deciding, *beside], delivery)
        )
        for given, which in zip(beside, moved, strict=True)
    )
    if is_unseen and all(given.is_pattern for given in deciding):
        # only a mask was recognised
        is_assumed, is_unseen = np.ones(len(rest), np.bool_), False
        cause = ANOTHER_INPUT
    unchecked = (ANOTHER_INPUT,) if is_unseen or _is_partial(found) else ()
    forward = ForwardPass(
        indices,
        _evidence(found, is_assumed),
        delivery,
        cause,
        is_assumed=is_assumed,
        unattributed=+unattributed,
        notes=(*delivery.identity.notes, *unchecked),
    )
    forward.alike = tuple(g for g in alike if (indices[g.rows] >= 0).all())
    forward.copies = (*copies, *delivery.copies_among(positions))
    return forward


def _is_partial(found: list[Finding]) -> bool:
    """Return whether one of several inputs shows only some of its samples."""
    return len(found) > 1 and not all(f.is_explained.all() for f in found)


def _evidence(found: list[Finding], is_assumed: NDArray[np.bool_] | None) -> str:
    """Return the kind of evidence of a pass, as ``Tracker.counts`` names it.

    Args:
        found: The findings of its inputs.
        is_assumed: Which samples are assumed to be in their places; None: no sample.
    """
    if is_assumed is not None and is_assumed.all():
        return "by_latest"
    return "by_storage" if any(f.by_storage for f in found) else "by_content"


def _in_order(
    found: list[Finding], positions: Indices, inputs: list[Input], order: OrderSoFar
) -> tuple[Indices, list[Alike], list[Alike]]:
    """Find the order of samples that look alike, as far as anything shows it.

    Args:
        found: The findings about the delivery that explains the inputs.
        positions: Position of each sample that is known; else a negative code.
        inputs: All inputs of the pass that have as many samples.
        order: What earlier passes have shown about the order; notes this one.

    Returns:
        Positions, those of samples that look alike included; the groups of those
        whose order is not known; and the groups of copies whose order is not known.
    """
    delivery, size = found[0].delivery, len(positions)
    groups = next((f.groups for f in found if f.groups), ())
    compared = [g.compared_with(delivery) for g in inputs] if groups else []
    positions, alike = settled(positions, groups, compared)
    num_delivered = len(cast(list[int], delivery.indices))
    moves_in_place = any(f.has_moved for f in found)
    if groups or moves_in_place or not any(f.by_storage for f in found):
        order.saw(positions, alike, size=num_delivered, in_place=moves_in_place)
    copies = [g for g in alike if delivery.has_equal_samples(g.places)]
    alike = [g for g in alike if g not in copies]
    is_rising = bool((np.diff(positions[positions >= 0]) > 0).all())
    if is_rising and not order.has_moved:
        order.num_copies_trusted += 0 if order.is_kept else len(rows_of_all(copies))
        copies = []
    if not (order.is_kept and is_rising):
        return positions, alike, copies
    order.num_trusted += len(rows_of_all(alike))
    if size == num_delivered:
        positions = _kept_in_place(found, positions, order)
    return positions, [], copies


def _kept_in_place(
    found: list[Finding], positions: Indices, order: OrderSoFar
) -> Indices:
    """Return positions in which samples that look alike are where they were delivered.

    Args:
        found: The findings about the delivery, which has as many samples.
        positions: Position of each sample that is known; else a negative code.
        order: Counts the samples that are trusted to be in their places.
    """
    for stays in (f.stays for f in found if f.stays is not None):
        is_in_place = stays & (positions == LOOKS_ALIKE)
        positions = np.where(is_in_place, np.arange(len(positions)), positions)
        order.num_trusted += int(np.count_nonzero(is_in_place))
    return positions


def _joined(
    found: list[Finding], by_index: Indices
) -> tuple[Indices, NDArray[np.bool_]]:
    """Join the findings of several inputs about one delivery.

    Returns:
        Position of each sample, ``UNKNOWN`` where no input shows it; and whether two
        inputs show different examples, bool ``(b,)``.
    """
    positions = np.full(len(found[0].positions), UNKNOWN)
    disagree = np.zeros(len(positions), dtype=np.bool_)
    for finding in found:
        own = np.where(finding.is_known, finding.positions, UNKNOWN)
        both = (own >= 0) & (positions >= 0)
        disagree |= both & (_at(by_index, own) != _at(by_index, positions))
        positions = np.where(positions < 0, own, positions)
    return positions, disagree


def _at(by_index: Indices, positions: Indices) -> Indices:
    """Return the indices at positions; ``UNATTRIBUTED`` where there is no position."""
    return np.where(positions >= 0, by_index[np.maximum(positions, 0)], UNATTRIBUTED)


def _is_of_others(
    given: Input, positions: Indices, delivery: Delivery
) -> NDArray[np.bool_]:
    """Find samples whose values in an input are those of other delivered examples.

    Labels and masks are alike in many samples, so they cannot be looked up. But if an
    input has the very values that a delivered tensor has for these samples, in another
    order, then it belongs to other examples.

    Args:
        given: The input.
        positions: Position of each sample in the delivery.
        delivery: The delivery.

    Returns:
        bool ``(b,)``: which samples have the value of another one.
    """
    none = np.zeros(len(positions), dtype=np.bool_)
    if (positions < 0).any():
        return none
    differing = []
    for sums, before in given.compared_with(delivery):
        expected = before[positions]
        if np.array_equal(sums, expected):
            return none
        if np.array_equal(np.sort(sums), np.sort(expected)):
            differing.append(sums != expected)
    return differing[0] if differing else none


def _is_explained(
    given: Input, positions: Indices, inputs: list[Input], delivery: Delivery
) -> bool:
    """Return whether an input is a mask, positions, or numbers of its own samples.

    Args:
        given: The input.
        positions: Position of each sample in the delivery.
        inputs: All inputs with as many samples.
        delivery: The delivery.
    """
    return given.is_pattern and are_own(given, positions, inputs, delivery)


def _is_ambiguous(
    deciding: list[Input], delivery: Delivery, indices: Indices, recent: list[Delivery]
) -> NDArray[np.bool_]:
    """Find recognised samples that another delivery explains by other examples."""
    ambiguous = np.zeros(len(indices), dtype=np.bool_)
    for other in recent:
        found = [given.finding_in(other) for given in deciding]
        others = [f for f in found if f is not None and f.num_explained == len(indices)]
        if other is delivery or len(others) < len(deciding):
            continue
        own = _at(cast(Indices, other.index_array), others[0].positions)
        differs = (own != indices) & (indices != UNATTRIBUTED)
        for group in others[0].groups:  # the same examples, in an order not known
            own = cast(Indices, other.index_array)[group.places]
            if np.array_equal(np.sort(own), np.sort(indices[group.rows])):
                differs[group.rows] = False
        ambiguous |= differs
    return ambiguous


def _assumed_places(
    found: list[Finding],
    rest: NDArray[np.bool_],
    deciding: list[Input],
    order: OrderSoFar,
) -> tuple[Indices | None, Cause | None]:
    """Decide whether samples that no input shows may be assumed to be in their places.

    They may if their memory is that of a delivered sample. Otherwise they may if the
    batch has as many samples as were delivered, all others are in their places, and
    unknown ones lie between known ones. A batch in which some samples were transformed
    looks like this; a batch put together from two sources does not. If the unknown ones
    are all at one end, they must be like the delivered samples in their places, or the
    loop must have transformed some samples of an earlier batch.

    Args:
        found: The findings of the inputs.
        rest: Mask of the samples that the inputs do not show.
        deciding: These inputs.
        order: What earlier passes have shown; notes whether some samples are changed.

    Returns:
        The positions that are assumed, and why they are uncertain; None and None if
        they may not be assumed.
    """
    for finding in found:
        if finding.is_assumed is not None and finding.is_assumed[rest].all():
            return finding.positions, CHANGED_IN_PLACE
    is_alike = any((f.positions[rest] == LOOKS_ALIKE).any() for f in found)
    if any(f.cause is not NOT_DELIVERED for f in found):
        return None, None
    if is_alike or not rest.any() or not all(f.is_in_place for f in found):
        return None, None
    num_changes = int(np.count_nonzero(np.diff(rest.astype(np.int8))))
    order.changes_some |= num_changes > 1
    is_usual = num_changes > 1 or (order.changes_some and not order.has_moved)
    if is_usual or _are_like_delivered(deciding, found[0].delivery, rest):
        return np.arange(len(rest)), COMPUTED
    return None, None


def _are_like_delivered(
    deciding: list[Input], delivery: Delivery, rest: NDArray[np.bool_]
) -> bool:
    """Return whether an input has samples that were computed from those in their place.

    Args:
        deciding: The inputs that show some samples.
        delivery: The batch, which has as many samples.
        rest: Mask of the samples that the inputs do not show, bool ``(b,)``.
    """
    rows = np.flatnonzero(rest)
    return any(
        given.content.width == before.width
        and are_near_own(given.content.entries, before.entries, rows)
        for given in deciding
        for before in delivery.all_contents()
    )


def _causes_of(found: list[Finding], rest: NDArray[np.bool_]) -> Counter[Cause]:
    """Count why samples that no input shows, and that are not assumed, are unknown."""
    causes = Counter[Cause]()
    is_alike = np.zeros(len(rest), dtype=np.bool_)
    for finding in found:
        is_alike |= rest & (finding.positions == LOOKS_ALIKE)
    causes[ALIKE] = int(np.count_nonzero(is_alike))
    established = [f.cause for f in found if f.cause is not NOT_DELIVERED]
    has_moved = any(f.is_as_large and not f.is_in_place for f in found)
    cause = MOVED_AND_CHANGED if has_moved else NOT_DELIVERED
    cause = established[0] if established else cause
    causes[cause] = int(np.count_nonzero(rest & ~is_alike))
    return +causes


# --------------------------------------------------------------------- nothing is known
def assumed(
    tensors: list[Tensor],
    dim: int,
    recent: Sequence[Delivery],
    *,
    has_others: bool = False,
    has_moved: bool = False,
    is_view: bool = False,
    cause: Cause = COMPUTED,
) -> ForwardPass:
    """Assume the latest batch, if these inputs cannot be made of another one.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the samples.
        recent: Deliveries, the newest first.
        has_others: Whether this loop gave the model other inputs beside a batch that
            was recognised. Inputs that are not recognised may then be such ones.
        has_moved: Whether this loop moved samples of a batch to other positions. The
            order of the latest batch is then not assumed.
        is_view: Whether they may be another view of a batch that was recognised.
        cause: Why no sample was recognised.
    """
    sizes = [tensor.shape[dim] for tensor in tensors]
    size = max(sizes, default=None)
    if not recent or recent[0].index_array is None:
        missing = NO_INDICES if recent else NO_DELIVERY
        return ForwardPass(None, "", None, missing, num_inputs=size)
    latest = recent[0]
    numbers = _numbers_kept(tensors, dim, latest)
    if latest.num_recognised and numbers is None and not is_view:
        return ForwardPass(None, "", None, NOT_DELIVERED, num_inputs=size)
    indices = cast(Indices, latest.index_array)
    reason = None
    if len(indices) not in sizes:
        reason = OTHER_SIZE
    elif not _is_only_candidate(latest, recent):
        reason = UNTRACED
    elif has_others and latest.differing:
        reason = BESIDE_BATCHES
    if reason is not None:
        return ForwardPass(None, "", None, reason, num_inputs=size, latest=latest)
    moved = MOVED_AND_CHANGED if has_moved else None
    cause_of_loss = moved or _lost_order_of(tensors, dim, latest)
    if cause_of_loss is not None:
        return ForwardPass(None, "", latest, cause_of_loss, num_inputs=size)
    unattributed = Counter[Cause]()
    if num_unknown := int(np.count_nonzero(indices == UNATTRIBUTED)):
        unattributed[latest.identity.cause] = num_unknown
    evidence = "by_latest"
    if numbers is not None:
        are_different = len(np.unique(numbers, axis=0)) == len(numbers)
        evidence, cause = ("by_content" if are_different else evidence), EQUAL_NUMBERS
    return ForwardPass(
        indices,
        evidence,
        latest,
        cause,
        unattributed=unattributed,
        notes=latest.identity.notes,
        num_inputs=size,
        latest=latest,
    )


def _lost_order_of(tensors: list[Tensor], dim: int, latest: Delivery) -> Cause | None:
    """Return what shows that inputs do not have the order of the latest batch."""
    are_numbers = all(c.width == 1 for c in latest.all_contents())
    for tensor in tensors:
        given = DelayedChecksums(tensor, dim)
        if are_numbers and given.width == 1 and _are_values_moved(given, latest):
            return VALUES_MOVED
        for delivered in latest.tensors:
            if delivered.content is not None and given.width > 1:
                cause = lost_order(given, delivered.content)
                if cause is not None:
                    return cause
    return None


def _are_values_moved(given: DelayedChecksums, latest: Delivery) -> bool:
    """Return whether an input has a delivered tensor's numbers in another order.

    A loop may also rename them, such as exchange two labels: then each number got one
    other, and some numbers occur several times. If all are different, such as ids, a
    renamed batch would hardly have the numbers of the delivered one.

    Args:
        given: The input, one number a sample.
        latest: The batch, whose tensors have one number a sample.
    """
    now, is_moved = given.checksums, False
    num_different = len(set(now.tolist()))
    for content in latest.all_contents():
        before = content.checksums
        if np.array_equal(now, before):
            return False
        if np.array_equal(np.sort(now), np.sort(before)):
            pairs = set(zip(before.tolist(), now.tolist(), strict=True))
            if len(pairs) == num_different < len(now):
                return False
            is_moved = True
    return is_moved


def _numbers_kept(tensors: list[Tensor], dim: int, latest: Delivery) -> Indices | None:
    """Return checksums of the numbers of each sample, if they are the delivered ones.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the samples.
        latest: The batch.

    Returns:
        int64 ``(b, m)``, one column for each input; None unless each of them has one
        number for each sample, these are those of a delivered tensor in its order, and
        they are not the same for all samples. None, too, if the batch is on an
        accelerator and was recognised already: nothing waits for a second pass.
    """
    is_on_host = all(content.is_on_host for content in latest.all_contents())
    if latest.num_recognised and not is_on_host:
        return None
    inputs = [DelayedChecksums(tensor, dim) for tensor in tensors]
    delivered = [c.checksums for c in latest.all_contents() if c.width == 1]
    if any(given.width != 1 for given in inputs):
        return None
    sums = [given.checksums for given in inputs]
    are_there = [any(np.array_equal(s, before) for before in delivered) for s in sums]
    differ = any((s != s[0]).any() for s in sums)
    return np.stack(sums, axis=1) if differ and all(are_there) else None


def _is_only_candidate(latest: Delivery, recent: Sequence[Delivery]) -> bool:
    """Return whether no other batch than the latest may still be waiting to be used.

    Batches of the same pass are counted; those of other passes may be waiting as long
    as their tensors exist or their pass is not over.
    """
    others = [d for d in recent if d.loader_pass is not latest.loader_pass]
    num_waiting = latest.loader_pass.num_unused
    num_waiting += sum(delivery.may_be_waiting() for delivery in others)
    return num_waiting == (0 if latest.num_forward_passes else 1)
