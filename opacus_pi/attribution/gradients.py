"""Match forward passes to the gradients that an optimizer has.

Usually each pass leaves the gradients of one batch. Several passes that enter one loss
leave one gradient for each sample: two views of a batch, or the real and the generated
samples of a GAN's discriminator. Such passes are joined, and the samples of the
recognised pass are used for all of them. If each pass has samples that were recognised,
as after a random masking that leaves some of them as they were, those that were
recognised in either pass are used, unless two passes disagree about a sample.

*Guarantee.* The numbers of samples must agree. Otherwise it is not known which gradient
belongs to which pass, and all samples are unattributed. A single pass whose gradients
have more rows than it has samples breaks the link "rows": it gave a layer several rows
of one example. If a pass was only assumed to
be of a batch, and the same batch was recognised in another pass, the first counts as
not delivered.
"""

from itertools import combinations, starmap
from typing import cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi.attribution.causes import (
    ANOTHER_INPUT,
    ANOTHER_PASS,
    EQUAL_NUMBERS,
    MISMATCH,
    NOT_DELIVERED,
    PASSES_DISAGREE,
    ROWS_IN_MODEL,
    UNSEEN,
    Cause,
)
from opacus_pi.attribution.delivery import UNATTRIBUTED, ForwardPass, Indices

__all__ = ["with_sizes"]


def with_sizes(
    done: list[ForwardPass], sizes: list[int], unseen: Cause = UNSEEN
) -> list[ForwardPass]:
    """Return one pass, with indices, for each set of gradients.

    Args:
        done: Passes whose backward pass has run, in backward order. A pass whose
            samples are not known is taken to have as many samples as the gradients at
            its position.
        sizes: How many samples each backward pass left gradients of, in the same order.
        unseen: Why gradients may have no pass.
    """
    if len(done) == len(sizes) == 1 and done[0].num_samples == sizes[0]:
        return done  # nearly always
    if len(done) != 1:
        done = _without_guesses(done)
    passes = done if len(done) == len(sizes) else _joined(done)
    if len(passes) == len(sizes):
        pairs = list(zip(passes, sizes, strict=True))
        if all(f.num_samples in (None, size) for f, size in pairs):
            return [
                _unattributed(size, f.cause or unseen) if f.num_samples is None else f
                for f, size in pairs
            ]
    causes = [f.cause for f in done if f.indices is None and f.cause]
    cause = causes[0] if causes else MISMATCH if done else unseen
    if cause is MISMATCH and _have_different_samples(done, sizes):
        cause = PASSES_DISAGREE
    elif cause is MISMATCH and _have_more_rows(done, sizes):
        cause = ROWS_IN_MODEL
    return [_unattributed(size, cause) for size in sizes]


def _have_different_samples(done: list[ForwardPass], sizes: list[int]) -> bool:
    """Return whether gradients are sums over passes with different samples.

    Args:
        done: Passes that cannot be joined, because their samples differ.
        sizes: As for ``with_sizes``.
    """
    if not len(sizes) == 1 < len(done):
        return False
    are_of_one_size = all(f.is_recognised and f.num_samples == sizes[0] for f in done)
    return are_of_one_size and any(starmap(_disagree, combinations(done, 2)))


def _have_more_rows(done: list[ForwardPass], sizes: list[int]) -> bool:
    """Return whether each backward pass left at least one gradient for each sample.

    Args:
        done: One pass for each backward pass, so that no two entered one loss.
        sizes: As for ``with_sizes``; they are not all the numbers of samples.
    """
    if len(done) != len(sizes):
        return False
    pairs = zip(done, sizes, strict=True)
    return all(f.num_samples is not None and f.num_samples <= n for f, n in pairs)


def _without_guesses(done: list[ForwardPass]) -> list[ForwardPass]:
    """Withdraw assumptions about a batch that was recognised in another pass.

    Inputs that were not recognised do not come from a batch that was itself given to
    the model, unless they are its numbers, one for each sample.
    """
    certain = {id(f.delivery) for f in done if f.is_recognised}
    return [
        f.without_indices(NOT_DELIVERED)
        if id(f.latest) in certain and f.cause is not EQUAL_NUMBERS
        else f
        for f in done
    ]


def _unattributed(size: int, cause: Cause) -> ForwardPass:
    """Return a pass of which no sample is attributed."""
    return ForwardPass(np.full(size, UNATTRIBUTED), "unattributed", None, cause)


def _joined(passes: list[ForwardPass]) -> list[ForwardPass]:
    """Join passes that entered one loss with the pass before them.

    These are passes over the same samples, and passes over as many samples that the
    loader did not deliver. The stronger evidence stays. An input that the loop computed
    for one of two passes, such as negatives for the users of a batch, makes it a pass
    over samples that the loader did not deliver.
    """
    kept: list[ForwardPass] = []
    for forward in passes:
        joint = _joint(kept[-1], forward) if kept else None
        if joint is None:
            kept.append(forward)
        else:
            kept[-1] = joint
    return kept


def _joint(one: ForwardPass, other: ForwardPass) -> ForwardPass | None:
    """Return the stronger of two passes that may be joined; None if they may not."""
    notes = dict.fromkeys((*one.notes, *other.notes))
    are_assumed = one.is_assumed is not None or other.is_assumed is not None
    if are_assumed and _may_complete(one, other):
        return _completed(one, other)
    if _are_same_samples(one.indices, other.indices):
        joint = other if other.is_recognised and not one.is_recognised else one
        if _has_computed_input(one) != _has_computed_input(other):
            notes.pop(ANOTHER_INPUT, None)
            notes[ANOTHER_PASS] = None
        joint.notes = tuple(notes)
        joint.copies = (*one.copies, *other.copies)
        return joint
    for known, beside in ((one, other), (other, one)):
        is_beside = beside.indices is None and beside.cause is NOT_DELIVERED
        if known.is_recognised and is_beside and beside.num_inputs == known.num_samples:
            known.notes = tuple({**notes, ANOTHER_PASS: None})
            return known
    if _may_complete(one, other):
        return _completed(one, other)
    return None


def _may_complete(one: ForwardPass, other: ForwardPass) -> bool:
    """Return whether two passes have recognised samples of a batch, and agree in them.

    Args:
        one: A pass.
        other: A pass whose loss is the same.
    """
    return (
        one.is_recognised
        and other.is_recognised
        and one.delivery is other.delivery
        and one.num_samples == other.num_samples
        and not (one.alike or other.alike)
        and not _conflicts(one, other).any()
    )


def _disagree(one: ForwardPass, other: ForwardPass) -> bool:
    """Return whether two passes were seen to have different samples in one position.

    Args:
        one: A pass with indices.
        other: A pass with as many.
    """
    conflicts = _conflicts(one, other)
    for forward in (one, other):
        if forward.is_assumed is not None:
            conflicts &= ~forward.is_assumed
    return bool(conflicts.any())


def _conflicts(one: ForwardPass, other: ForwardPass) -> NDArray[np.bool_]:
    """Return in which positions two passes have different samples, bool ``(b,)``.

    Args:
        one: A pass with indices.
        other: A pass with as many.
    """
    ours, theirs = cast(Indices, one.indices), cast(Indices, other.indices)
    are_known = (ours != UNATTRIBUTED) & (theirs != UNATTRIBUTED)
    conflicts: NDArray[np.bool_] = are_known & (ours != theirs)
    return conflicts


def _completed(one: ForwardPass, other: ForwardPass) -> ForwardPass:
    """Return a pass over the samples that were recognised in either of two passes.

    Of the other samples neither pass shows which examples they are.

    Args:
        one: A pass with indices.
        other: A pass that may complete it.
    """
    notes = dict.fromkeys((*one.notes, *other.notes))
    if not np.array_equal(one.were_seen, other.were_seen):
        notes[ANOTHER_INPUT] = None  # some samples were recognised in one pass only
    if other.is_whole_delivery:
        one, other = other, one
    if not one.is_whole_delivery:
        one.complete(other)
    one.notes, one.copies = tuple(notes), (*one.copies, *other.copies)
    return one


def _has_computed_input(forward: ForwardPass) -> bool:
    """Return whether the loop computed an input of a pass beside those of the batch."""
    return ANOTHER_INPUT in forward.notes or forward.cause is ANOTHER_INPUT


def _are_same_samples(one: Indices | None, other: Indices | None) -> bool:
    """Return whether two passes have the same known samples, in the same order."""
    if one is None or other is None or UNATTRIBUTED in other:
        return False
    return np.array_equal(one, other)
