"""Find out whether a ``collate_fn`` makes an example depend on others of its batch.

A ``collate_fn`` may pad examples to the longest of the batch, or compute values of all
of them. Then an example's gradient may depend on which others are in its batch, which
neither clipping nor accounting covers. So each example of an audited batch is collated
again among other items: its position and the number of items stay, and the places of
the others are filled with copies of one item, the smallest. The norm of its gradient,
alone, must not change.

*Guarantee.* Random numbers start in the same state for each call, a copy of
``collate_fn`` is called on copies of the items, and all random states are restored.

*What breaks it.* A dependence that this smallest item does not show, or that changes
the direction of gradients only. A ``collate_fn`` that draws random numbers or counts
its calls is judged only if all items have the same shape: otherwise the other items
may have changed what it draws.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from opacus_pi.attribution import keeps_order
from opacus_pi.attribution.causes import ADDED_IN_COLLATE
from opacus_pi.attribution.collate_identity import FollowingCollate
from opacus_pi.attribution.delivery import sample_dim
from opacus_pi.attribution.item_fingerprints import fingerprint_items
from opacus_pi.attribution.samples import tensors_in
from opacus_pi.custody import Chain
from opacus_pi.custody.function_copies import copy_of_function
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.integration.audit import Audit, AuditRow, audit_batch, finding_of
from opacus_pi.integration.audited_run import AuditedRun, Examples
from opacus_pi.integration.audited_update import (
    TrainedLoss,
    largest_gap,
    measuring,
    norms_alone,
    quiet_copy,
    rounding_of,
    times_as_large,
)
from opacus_pi.models.batches import (
    device_of,
    inputs_and_targets,
    rows_of,
    tensors_of,
    to_device,
)
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.recording import Recorder

__all__ = ["audit_items", "tell_of_collate"]

_SAME = (
    "Collating {size} examples among other items did not change the norms of their "
    "gradients."
)
_COUPLED = (
    "Collated among other items, examples have norms that are {difference}. So what "
    "collate_fn makes of an example depends on the other examples of its batch, and "
    "max_grad_norm does not bound what an example contributes. If collate_fn pads to "
    "the longest example, pad to a fixed length or leave the padding out of the "
    "model's means and of the loss. Compute nothing from several items."
)
_MOVED = (
    "When other items were collated with an example, it came back in another position. "
    "Samples of this collate_fn cannot be matched to items, so they were assumed to be "
    "in the order of the items, which is wrong. Sort or choose items in the data set "
    "or the sampler instead."
)
_RANDOM = (
    "Collated among other items, examples have other norms, but collate_fn draws "
    "random numbers or keeps a state, which may be the cause. So it is not known "
    "whether what it makes of an example depends on the others of its batch. Draw "
    "random numbers in the data set, or pad to a fixed length."
)
_NOT_RUN = (
    "collate_fn could not be called again on other items ({error}), so it is not known "
    "whether what it makes of an example depends on the others of its batch. Make it "
    "work for any items of the data set, and audit again."
)
_NOT_MATCHED = (
    "The examples could not be found in what collate_fn returned, so it is not known "
    "whether what it makes of an example depends on the others of its batch. Transform "
    "items in the data set instead, and audit again."
)


@dataclass(frozen=True)
class _Collation:
    """A collated batch, and where its items are in it.

    Args:
        batch: What ``collate_fn`` returned.
        places: For each item its position, or -1; None: not known.
        size: The number of samples.
    """

    batch: Any
    places: Sequence[int] | None
    size: int


def audit_items(
    model: nn.Module,
    criterion: Any,
    items: list[Any],
    *,
    run: AuditedRun,
    new_engine: Callable[[Recorder], Any],
) -> Audit:
    """Audit one batch, and what the user's ``collate_fn`` makes of its items.

    Args:
        model: As for ``audit_batch``.
        criterion: As for ``audit_batch``.
        items: The items of the batch; ``collate_fn`` may change them.
        run: How the batch is trained on, with its ``examples``.
        new_engine: As for ``audit_batch``.

    Returns:
        The audit, with a row "batch" unless torch's own ``collate_fn`` is used.

    Raises:
        ValueError: As ``audit_batch``.
    """
    examples = cast(Examples, run.examples)
    is_known = keeps_order(examples.collate_fn)
    try:
        kept = None if is_known else copy.deepcopy(items)
        problem = ""
    except (*MODEL_ERRORS, copy.Error) as error:
        kept, problem = None, _first_line(error)
    batch = examples.collated(items)
    audit = audit_batch(model, criterion, batch, run=run, new_engine=new_engine)
    if is_known:
        return audit
    row = AuditRow("batch", None, _NOT_RUN.format(error=problem))
    if kept is not None:
        loss = TrainedLoss(criterion, run)
        try:
            with measuring():
                collated = _Collated(kept, examples, run.batch_dim)
                row = _row(audit, collated, loss, model, run)
        except (*MODEL_ERRORS, copy.Error) as error:
            row = AuditRow("batch", None, _NOT_RUN.format(error=_first_line(error)))
    return replace(audit, rows=(*audit.rows, row))


def tell_of_collate(audit: Audit, chain: Chain) -> None:
    """Report what an audit found about ``collate_fn`` to the link "rows".

    Args:
        audit: The audit, with a row "batch" or without.
        chain: The chain of custody of the run.
    """
    for row in (row for row in audit.rows if row.name == "batch"):
        chain.settle("rows", ADDED_IN_COLLATE.explanation)
        finding_of(row).tell(chain, "rows")


def _first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _row(
    audit: Audit,
    collated: "_Collated",
    loss: TrainedLoss,
    model: nn.Module,
    run: AuditedRun,
) -> AuditRow:
    """Compare the norms of each example in its batch with those among other items."""
    whole, size = collated.among_its_own(), len(audit.expected)
    before, after = [], []
    for item in range(min(size, len(collated.items))):
        if whole.places is None and size != len(collated.items):
            break
        place = item if whole.places is None else whole.places[item]
        other = collated.among_others(item)
        now = item
        if whole.places is not None and other.places is not None:
            now = other.places[item]
        if place < 0 or now < 0:
            continue
        if whole.places is None and collated.has_moved(other, item):
            return AuditRow("batch", False, _MOVED)
        x, y = to_device(inputs_and_targets(other.batch), device_of(model))
        one, target = rows_of((x, y), [now], other.size, run.batch_dim)
        copied = quiet_copy(model, run)
        before.append(audit.expected[place])
        after.append(norms_alone(copied, loss, one, target, run.batch_dim)[0])
    if not before:
        return AuditRow("batch", None, _NOT_MATCHED)
    own, among_others = torch.stack(before), torch.stack(after)
    if largest_gap(among_others, own) <= rounding_of(model):
        return AuditRow("batch", True, _SAME.format(size=len(own)))
    if not collated.has_one_shape and collated.is_random():
        return AuditRow("batch", None, _RANDOM)
    difference = times_as_large(among_others, own)
    return AuditRow("batch", False, _COUPLED.format(difference=difference))


class _Collated:
    """Collates the items of a batch again, each among copies of a small one.

    Args:
        items: The items.
        examples: Has the ``collate_fn``.
        batch_dim: The dimension that runs over the samples.
    """

    def __init__(self, items: list[Any], examples: Examples, batch_dim: int) -> None:
        self.items = items
        self._function = examples.collate_fn or default_collate
        self._batch_dim = batch_dim
        self._fingerprints = fingerprint_items(items)
        self._by_width = np.argsort(
            self._fingerprints.widths.sum(axis=1), kind="stable"
        ).tolist()

    @property
    def has_one_shape(self) -> bool:
        """Whether all items are known to have the same shapes."""
        shapes = self._fingerprints.shapes
        widths = self._fingerprints.widths
        return bool((widths > 0).all()) and all(len(set(part)) == 1 for part in shapes)

    def among_its_own(self) -> _Collation:
        """Return the batch of the items."""
        return self._collate(list(range(len(self.items))))

    def among_others(self, item: int) -> _Collation:
        """Return the batch in which one item keeps its place, and another fills it.

        Args:
            item: Which item.
        """
        filling = next(other for other in self._by_width if other != item)
        chosen = [filling] * len(self.items)
        chosen[item] = item
        return self._collate(chosen)

    def is_random(self) -> bool:
        """Return whether two calls on the same items return different batches."""
        collate = copy_of_function(self._function)
        one, other = (tensors_of(collate(copy.deepcopy(self.items))) for _ in range(2))
        return len(one) != len(other) or not all(map(torch.equal, one, other))

    def has_moved(self, collation: _Collation, item: int) -> bool:
        """Return whether the one sample that is not like the others is elsewhere.

        Args:
            collation: What ``among_others`` returned.
            item: The item that was not replaced.
        """
        found = set()
        for tensor in tensors_in(collation.batch):
            dim = sample_dim(tensor, collation.size, self._batch_dim)
            if dim is not None and collation.size > 2:
                found |= _odd_row(tensor.movedim(dim, 0))
        return bool(found) and item not in found

    def _collate(self, chosen: list[int]) -> _Collation:
        """Collate items, from the same state of all generators in each call.

        Args:
            chosen: Which items.
        """
        collate = FollowingCollate(
            copy_of_function(self._function),
            is_single=False,
            batch_dim=self._batch_dim,
        )
        items = [copy.deepcopy(self.items[item]) for item in chosen]
        with random_state_untouched():
            batch, identity = collate(items)
        if identity.notes:
            return _Collation(batch, None, len(chosen))
        order = list(range(len(chosen)))
        if identity.items is not None:
            order = identity.items.tolist()
        places = [order.index(i) if i in order else -1 for i in range(len(chosen))]
        return _Collation(batch, places, len(order))


def _odd_row(rows: Tensor) -> set[int]:
    """Return the row that differs from all others, which are equal; else nothing.

    Args:
        rows: ``(b, ...)`` with b at least 3.
    """
    usual = (
        rows[0] if any(torch.equal(rows[0], other) for other in rows[1:]) else rows[1]
    )
    differs = [i for i, row in enumerate(rows) if not torch.equal(row, usual)]
    return set(differs) if len(differs) == 1 else set()
