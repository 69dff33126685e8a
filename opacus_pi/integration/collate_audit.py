"""Find out whether a ``collate_fn`` makes an example depend on others of its batch.

A ``collate_fn`` may pad examples to the longest of the batch, or compute values of all
of them. Then an example's gradient may depend on which others are in its batch, which
neither clipping nor accounting covers. So each example of an audited batch is collated
again among other items (:mod:`~opacus_pi.integration.collations`): among copies of the
smallest item and of the largest, in its own place, and alone. If its rows are not the
same then, the norm of its gradient, alone, must be. Nor may it depend on the others
whether an example is left out.

*Guarantee.* Random numbers start in the same state for each call, a copy of
``collate_fn`` is called on copies of the items, and all random states are restored.

*What breaks it.* A dependence that neither of these items shows, or that changes the
direction of gradients only. A ``collate_fn`` that draws random numbers or counts its
calls is not given an item alone, and is judged only if all items have the same shape:
otherwise the other items may have changed what it draws. Examples that it adds from
elsewhere are not seen, so nothing is said of one that refers to the data set
(:mod:`~opacus_pi.custody.reached_data`).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from opacus_pi.attribution import keeps_order
from opacus_pi.attribution.causes import ADDED_IN_COLLATE
from opacus_pi.custody import Chain
from opacus_pi.custody.reached_data import reaches_data
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.integration.audit import Audit, AuditRow, audit_batch, finding_of
from opacus_pi.integration.audited_run import AuditedRun, Examples
from opacus_pi.integration.audited_update import (
    TrainedLoss,
    forward_with_precision,
    largest_gap,
    measuring,
    norms_alone,
    quiet_copy,
    rounding_of,
    times_as_large,
)
from opacus_pi.integration.collations import Collated, Collation, Company
from opacus_pi.models.batches import (
    device_of,
    inputs_and_targets,
    rows_of,
    to_device,
)
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
_CHOSEN = (
    "Among other items collate_fn left out an example that it had kept, or kept one "
    "that it had left out. So an example decides whether others are used, for example "
    "because the size of the batch is limited, and no accounting covers that. Choose "
    "examples in the sampler, independently of the data."
)
_READS = (
    "collate_fn adds something to the items and refers to the data set, so it can add "
    "examples that are not in the batch, such as negatives. max_grad_norm does not "
    "bound what such an example contributes, and the ledger does not count it. If "
    "collate_fn adds no examples, nothing needs to be done. Otherwise add none."
)
_ADDS = (
    "collate_fn returned {size} samples of {num} items. If an item is in several of "
    "them, or if others were added to the items, max_grad_norm does not bound what an "
    "example contributes. Return one sample for each item."
)
_NOT_RUN = (
    "collate_fn could not be called again on other items ({error}), so it is not known "
    "whether what it makes of an example depends on the others of its batch. Make it "
    "work for any items of the data set, and audit again."
)
_NO_NORMS = (
    "There are no norms to compare, so it is not known whether what collate_fn makes "
    "of an example depends on the others of its batch."
)
_NOT_MATCHED = (
    "The examples could not be found in what collate_fn returned, so it is not known "
    "whether what it makes of an example depends on the others of its batch. Transform "
    "items in the data set instead, and audit again."
)


def audit_items(
    model: nn.Module,
    criterion: Any,
    places: list[int],
    *,
    run: AuditedRun,
    new_engine: Callable[[Recorder], Any],
) -> Audit:
    """Audit one batch, and what the user's ``collate_fn`` makes of its items.

    Args:
        model: As for ``audit_batch``.
        criterion: As for ``audit_batch``.
        places: Positions of the batch's examples in the data set.
        run: How the batch is trained on, with its ``examples``.
        new_engine: As for ``audit_batch``.

    Returns:
        The audit, with a row "batch" unless torch's own ``collate_fn`` is used.

    Raises:
        ValueError: As ``audit_batch``.
    """
    examples = cast(Examples, run.examples)
    is_known = keeps_order(examples.collate_fn)
    items = examples.items(places)
    try:
        kept = None if is_known else copy.deepcopy(items)
        problem = ""
    except (*MODEL_ERRORS, copy.Error) as error:
        kept, problem = None, _first_line(error)
    batch = examples.collated(items)
    audit = audit_batch(
        model,
        criterion,
        batch,
        run=run,
        new_engine=new_engine,
        places=places if is_known else None,
    )
    if is_known:
        return audit
    row = AuditRow("batch", None, _NOT_RUN.format(error=problem))
    if audit.expected.isnan().all():
        row = AuditRow("batch", None, _NO_NORMS)
    elif kept is not None:
        loss = TrainedLoss(criterion, run)
        try:
            with measuring():
                collated = Collated(kept, examples, run.batch_dim)
                comparison = _Comparison(audit, collated, loss, model, run)
                row = _unless_data_are_read(comparison.row(), collated, examples)
        except (*MODEL_ERRORS, copy.Error) as error:
            row = AuditRow("batch", None, _NOT_RUN.format(error=_first_line(error)))
    return replace(audit, rows=(*audit.rows, row))


def tell_of_collate(audit: Audit, chain: Chain) -> None:
    """Report what an audit found about ``collate_fn`` to the link "rows" or "draw".

    Args:
        audit: The audit, with a row "batch" or without.
        chain: The chain of custody of the run.
    """
    for row in (row for row in audit.rows if row.name == "batch"):
        chain.settle("rows", ADDED_IN_COLLATE.explanation)
        finding_of(row).tell(chain, "draw" if row.sentence == _CHOSEN else "rows")


def _first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _unless_data_are_read(
    row: AuditRow, collated: Collated, examples: Examples
) -> AuditRow:
    """Return a row, or that examples from elsewhere may have been added.

    Args:
        row: What the comparison found.
        collated: Collates the items of the batch.
        examples: Has the data set and the ``collate_fn``.
    """
    function, has_more = examples.collate_fn, collated.among_its_own().has_more
    if row.passed is False or not has_more or function is None:
        return row
    is_read = reaches_data(function, examples.data_set)
    return AuditRow("batch", None, _READS) if is_read else row


class _Comparison:
    """Compares each example in its batch with the same example among other items.

    Args:
        audit: The audit of the batch.
        collated: Collates its items again.
        loss: The criterion.
        model: The model.
        run: How it is trained.
    """

    def __init__(
        self,
        audit: Audit,
        collated: Collated,
        loss: TrainedLoss,
        model: nn.Module,
        run: AuditedRun,
    ) -> None:
        self._expected, self._collated = audit.expected, collated
        self._loss, self._model, self._run = loss, model, run
        self._whole, self._is_random = collated.among_its_own(), collated.is_random()
        self._compared: set[int] = set()
        self._norms: list[tuple[float, float]] = []  # in the batch, and among others

    def row(self) -> AuditRow:
        """Return what was found."""
        whole, num = self._whole, len(self._collated.items)
        if whole.size > num:
            return AuditRow("batch", None, _ADDS.format(size=whole.size, num=num))
        is_known = whole.places is not None or len(self._expected) == num
        for item in range(num if is_known else 0):
            problem = self._compare(item)
            if problem:
                return AuditRow("batch", False, problem)
        if not self._compared:
            return AuditRow("batch", None, _NOT_MATCHED)
        own, others = torch.tensor([*self._norms, (0.0, 0.0)], dtype=torch.float64).T
        if largest_gap(others, own) <= self._rounding():
            text = _SAME.format(size=len(self._compared))
            return AuditRow("batch", True, text)
        if self._is_random and not self._collated.has_one_shape:
            return AuditRow("batch", None, _RANDOM)
        difference = times_as_large(others[:-1], own[:-1])
        return AuditRow("batch", False, _COUPLED.format(difference=difference))

    def _rounding(self) -> float:
        """Return the relative difference of norms that rounding may cause."""
        model, batch = self._model, self._whole.batch
        x, _ = to_device(inputs_and_targets(batch), device_of(model))
        with torch.no_grad():
            quiet = quiet_copy(model, self._run)
            return rounding_of(model, forward_with_precision(quiet, x)[1])

    def _compare(self, item: int) -> str:
        """Compare one example among its own and among other items.

        Args:
            item: Its position among the items.

        Returns:
            What is wrong; empty if norms must decide it, or nothing is wrong.
        """
        place, known = self._whole.place_of(item), list[list[Tensor]]()
        if place >= 0 and (rows := self._whole.rows(place, self._run.batch_dim)):
            known.append(rows)
        may_be_alone = not self._is_random
        for company in self._collated.companies(item, may_be_alone=may_be_alone):
            try:
                problem = self._compare_in(company, item, known)
            except MODEL_ERRORS:
                if not company.is_alone:  # a batch of one may be impossible
                    raise
            else:
                if problem:
                    return problem
        return ""

    def _compare_in(
        self, company: Company, item: int, known: list[list[Tensor]]
    ) -> str:
        """Compare one example among its own and in one company.

        Args:
            company: The other items.
            item: The position of the example among its own.
            known: Rows of it whose norm was computed; these are added.
        """
        whole, other = self._whole, self._collated.with_company(company)
        place, now = whole.place_of(item), other.place_of(company.place)
        if not self._is_random and _is_chosen(whole, item, other, company.place):
            return _CHOSEN
        if place < 0 or now < 0:
            return ""
        if whole.places is None and self._collated.has_moved(other, company.place):
            return _MOVED
        rows = other.rows(now, self._run.batch_dim)
        if rows is None or not any(_are_equal(rows, own) for own in known):
            self._norms.append((float(self._expected[place]), self._norm(other, now)))
            known += [] if rows is None else [rows]
        self._compared.add(item)
        return ""

    def _norm(self, collation: Collation, place: int) -> float:
        """Return the norm of the gradient of one sample of a batch.

        Args:
            collation: The batch.
            place: The position of the sample.
        """
        dim, model = self._run.batch_dim, self._model
        x, y = to_device(inputs_and_targets(collation.batch), device_of(model))
        one, target = rows_of((x, y), [place], collation.size, dim)
        copied = quiet_copy(model, self._run)
        return float(norms_alone(copied, self._loss, one, target, dim)[0])


def _is_chosen(whole: Collation, item: int, other: Collation, place: int) -> bool:
    """Return whether an item is left out of one batch and not of another one.

    If the batch has all of its items, it may be any of them.

    Args:
        whole: The batch.
        item: The item's position among the items of the batch.
        other: The other batch.
        place: The item's position among the items of the other batch.
    """
    if not whole.num_left_out:
        return other.num_left_out > 0
    is_kept = whole.place_of(item) >= 0, other.place_of(place) >= 0
    is_left_out = whole.is_left_out(item), other.is_left_out(place)
    return (is_kept[0] and is_left_out[1]) or (is_left_out[0] and is_kept[1])


def _are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether two samples are equal in all that their batches have of them.

    Args:
        one: The rows of one of them.
        other: The rows of the other.
    """
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )
