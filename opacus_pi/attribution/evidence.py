"""Which samples a model was given: by storage, by content, or from the latest batch.

Between the loader and the model the training loop may do anything: copy a batch, cut
it, permute it, put it aside. Each function compares the model's inputs with the recent
deliveries by one kind of evidence, and returns a ``ForwardPass`` with the data-set
index of each sample. A sample about which the evidence disagrees stays unattributed;
it is never guessed.

*Guarantee.* ``by_storage`` and ``by_content`` attribute a sample only if its memory, or
the checksum of its content, is that of a delivered sample, and if no other delivered
sample fits as well. ``by_latest`` does not verify anything: it assumes that the inputs
were computed from the latest batch, in its order, and only where no other batch is
waiting to be used.

*What breaks it.* Content that was changed behind torch's back (``.data``, NumPy) keeps
the storage. Two inputs of one model that carry the same samples in different orders are
unattributed where both are recognised, but an input that is not recognised is not
compared. A loop that permutes samples and also computes new inputs from them is
attributed wrongly by ``by_latest``.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np
from torch import Tensor

from opacus_pi.attribution.delivery import (
    UNATTRIBUTED,
    Delivery,
    ForwardPass,
    Indices,
)
from opacus_pi.attribution.samples import StoredSamples, sample_checksums

__all__ = ["by_content", "by_latest", "by_storage"]


# ------------------------------------------------------------------------- by storage
def by_storage(tensors: list[Tensor], dim: int, recent: list[Delivery]) -> ForwardPass:
    """Attribute samples whose memory is that of a delivered sample.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the samples.
        recent: Deliveries, the newest first.

    Returns:
        A pass with the indices; cause ``"modified"`` if the memory was written to since
        the delivery; without evidence where nothing matched.
    """
    whole = _whole_latest_batch(tensors, dim, recent)
    if whole is not None:
        return whole
    found, modified = [], False
    for tensor in tensors:
        for delivery, stored in _all_stored(recent):
            where = stored.positions(tensor, dim)
            if where is not None:
                found.append((delivery, cast(Indices, delivery.index_array)[where]))
                modified |= stored.modified(tensor)
                break
    forward = _agreed(found, "by_storage")
    if modified and not forward.cause:
        forward.cause = "modified"
    return forward


def _whole_latest_batch(
    tensors: list[Tensor], dim: int, recent: list[Delivery]
) -> ForwardPass | None:
    """Return the pass if its one input is a tensor of the latest batch, untouched.

    This is what nearly every loop does, and it needs no array of indices.
    """
    if len(tensors) != 1 or not recent or not recent[0].are_distinct:
        return None
    for stored in recent[0].stored:
        if stored.are_all_of(tensors[0], dim):
            cause = "modified" if stored.modified(tensors[0]) else ""
            return ForwardPass.of_whole_delivery(recent[0], "by_storage", cause)
    return None


def _all_stored(recent: list[Delivery]) -> Iterator[tuple[Delivery, StoredSamples]]:
    """Yield each tensor of each delivery, the newest delivery first."""
    for delivery in recent:
        for stored in delivery.stored:
            yield delivery, stored


# ------------------------------------------------------------------------- by content
def by_content(tensors: list[Tensor], dim: int, recent: list[Delivery]) -> ForwardPass:
    """Attribute samples whose checksums are those of delivered samples.

    The widest inputs that are recognised decide, because short ones (masks, flags) are
    often alike. Of the deliveries, those count that explain the most of these inputs;
    samples about which such deliveries disagree stay unattributed.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the samples.
        recent: Deliveries, the newest first.
    """
    by_width: dict[int, list[Indices]] = {}
    for width, sums in (sample_checksums(tensor, dim) for tensor in tensors):
        by_width.setdefault(width, []).append(sums)
    for width in sorted(by_width, reverse=True):
        forward = _by_content_of_width(width, by_width[width], recent)
        if forward is not None:
            return forward
    return ForwardPass(None, "")


def _by_content_of_width(
    width: int, inputs: list[Indices], recent: list[Delivery]
) -> ForwardPass | None:
    """Attribute samples by the inputs of one width; None if they decide nothing.

    Args:
        width: Number of entries in a sample.
        inputs: Checksums of each input of this width.
        recent: Deliveries, the newest first.
    """
    candidates = []  # delivery, the inputs that it explains, the indices of its samples
    for delivery in recent:
        if width in delivery.checksums:
            explained, indices = _explain(inputs, delivery, width)
            candidates.append((delivery, explained, indices))
    most = max((len(explained) for _, explained, _ in candidates), default=0)
    together = set().union(*(explained for _, explained, _ in candidates))
    if len(together) > most:  # inputs of several batches in one forward pass
        return ForwardPass(None, "unattributed", None, "mismatch")
    best = [
        (delivery, indices)
        for delivery, explained, indices in candidates
        if indices is not None and len(explained) == most
    ]
    forward = _agreed(best, "by_content")
    known = forward.indices is not None and (forward.indices != UNATTRIBUTED).any()
    return forward if known else None


def _explain(
    inputs: list[Indices], delivery: Delivery, width: int
) -> tuple[set[int], Indices | None]:
    """Find the inputs that consist of a delivery's samples, and of which.

    Returns:
        The positions of these inputs, and the indices of their samples; none and None
        if there are no such inputs, or if they have different numbers of samples.
    """
    delivered = delivery.checksums[width]
    indices = cast(Indices, delivery.index_array)
    pairs = {
        (i, j): (given, known)
        for i, given in enumerate(inputs)
        for j, known in enumerate(delivered)
        if _consists_of(given, known)
    }
    if len({len(given) for given, _ in pairs.values()}) != 1:
        return set(), None
    explained = {i for i, _ in pairs}
    if all(np.array_equal(given, known) for given, known in pairs.values()):
        return explained, indices  # all samples in their places, even equal ones
    found = np.stack([_look_up(*pair, indices) for pair in pairs.values()])
    top = found.max(axis=0)
    agree = ((found == top) | (found == UNATTRIBUTED)).all(axis=0)
    return explained, np.where(agree, top, UNATTRIBUTED)


def _consists_of(given: Indices, known: Indices) -> bool:
    """Whether there are checksums, and each of them is among the known ones."""
    return bool(len(given) and given[0] in known and np.isin(given, known).all())


def _look_up(sums: Indices, delivered: Indices, indices: Indices) -> Indices:
    """Return the indices of the samples with these checksums.

    Where a checksum occurs twice, in the delivery or among the inputs, the samples look
    alike and stay unattributed.
    """
    values, first, counts = np.unique(delivered, return_index=True, return_counts=True)
    place = np.searchsorted(values, sums)
    _, back, given = np.unique(sums, return_inverse=True, return_counts=True)
    alone = (counts[place] == 1) & (given[back] == 1)
    return np.where(alone, indices[first[place]], UNATTRIBUTED)


# -------------------------------------------------------------------------- by latest
def by_latest(
    tensors: list[Tensor], dim: int, recent: list[Delivery], *, usually_known: bool
) -> ForwardPass:
    """Assume the latest batch, if these inputs cannot be made of another one.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the samples.
        recent: Deliveries, the newest first.
        usually_known: Whether this loop's inputs were recognised before. Inputs that
            are not recognised now are then not assumed to be the latest batch.
    """
    if not recent or recent[0].index_array is None:
        return ForwardPass(None, "unattributed", None, "indices")
    latest = recent[0]
    indices = cast(Indices, latest.index_array)
    is_surprising = usually_known and bool(latest.checksums)
    fits = any(tensor.shape[dim] == len(indices) for tensor in tensors)
    if is_surprising or not fits or not _is_only_candidate(latest, recent):
        return ForwardPass(None, "unattributed", None, "reordered")
    return ForwardPass(indices, "by_latest", latest)


def _is_only_candidate(latest: Delivery, recent: list[Delivery]) -> bool:
    """Whether no other batch than the latest may still be waiting to be used.

    Batches of the same pass are counted; those of other passes may be waiting as long
    as their tensors exist or their pass is not over.
    """
    others = [d for d in recent if d.loader_pass is not latest.loader_pass]
    num_waiting = latest.loader_pass.num_unused
    num_waiting += sum(delivery.may_be_waiting() for delivery in others)
    return num_waiting == (0 if latest.num_forward_passes else 1)


# --------------------------------------------------------------------------- agreeing
def _agreed(found: Iterable[tuple[Delivery, Indices]], evidence: str) -> ForwardPass:
    """Return what all findings agree on; where they disagree, unattributed samples."""
    findings = list(found)
    if not findings:
        return ForwardPass(None, "")
    delivery, indices = findings[0]
    if any(len(other) != len(indices) for _, other in findings):
        return ForwardPass(None, "unattributed", None, "mismatch")
    for _, other in findings[1:]:
        indices = np.where(other == indices, indices, UNATTRIBUTED)
    cause = "alike" if UNATTRIBUTED in indices else ""
    return ForwardPass(indices, evidence, delivery, cause)
