"""Compare what is recorded for a batch with the gradients of its examples alone.

An audit answers one question before a training run is trusted: is a recorded norm the
norm of one example's own gradient? It trains a copy of the model for one update on a
few examples, exactly as the engine does, and differentiates each of these examples
alone by plain autograd. Four things are compared:

* ``norms``: the recorded norms, with those of the examples alone;
* ``loss``: the loss of the batch, with the mean or the sum of the examples' own losses;
* ``model``: the outputs for some examples, before and after others are replaced; where
  the norms disagree, also those for each example alone
  (:mod:`~opacus_pi.integration.outputs_alone`);
* ``order``: the recorded norms, with those of the batch in reverse order; if the model
  fails on it, with those of the batch without its last example.

With a ``collate_fn`` of the user's there is a fifth, ``batch``: the norms of the
examples alone, with those after other items were collated in the places of the others
(:mod:`~opacus_pi.integration.collate_audit`).

**Guarantee.** Model, criterion, optimizer, loader, ledger and the global random states
stay as they are: the model and the criterion are copied. So is the ``collate_fn``, and
generators of torch that a data set draws from are put back.

**What it cannot put back.** What a data set changes when an item is read: generators of
NumPy and Python that are objects of its own, counters, caches. The same holds for a
``collate_fn`` or a criterion that cannot be copied, or that keeps a state in a file, in
a class, or in variables of functions that it calls.

**What it cannot see.** How the training loop calls model and criterion. The audit
assumes ``criterion(model(x), y)``. Dropout is switched off, because an example alone
would draw other random numbers than in a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._validate import expect
from opacus_pi.custody.finding import Finding
from opacus_pi.custody.model_probe import probe_separability
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.integration.audited_run import AuditedRun
from opacus_pi.integration.audited_update import (
    TrainedLoss,
    largest_gap,
    measuring,
    norms_of_copy,
    quiet_copy,
    recorded_norms,
    rounding_of,
    times_as_large,
)
from opacus_pi.integration.failed_calls import (
    failure_alone,
    outputs_of_batch,
    require_fitting,
)
from opacus_pi.integration.failed_updates import failed_update, notes_of
from opacus_pi.integration.outputs_alone import compare_alone
from opacus_pi.integration.repeated_calls import changing_part
from opacus_pi.models.batches import (
    arguments,
    device_of,
    inputs_and_targets,
    num_examples,
    rows_of,
    to_device,
)
from opacus_pi.models.live_modules import uncalled_by_criterion
from opacus_pi.models.own_losses import CoupledLoss
from opacus_pi.models.token_loss import warn_of_copied_labels
from opacus_pi.recording import Recorder

__all__ = [
    "Audit",
    "AuditRow",
    "audit_batch",
    "finding_of",
    "joined",
]

_OTHER_NUMBER = (
    "{num} norms were recorded for {size} examples, so they cannot be compared. This "
    "happens if a layer is not given exactly one row for each example: it gets only "
    "some of the examples (a model that routes them), or several rows for each (two "
    "views of an example). Give every layer all examples, and choose between outputs "
    "with torch.where. Put several views along another dimension than the first, or "
    'use grad_sample_mode="fast".'
)
_NO_NORMS = "There are no norms to compare."
_NO_LOSS = "There is no finite loss to compare."
_NOT_REPEATABLE = (
    "{what} returns other values when it is called again on the same examples. Either "
    "it draws random numbers, or it keeps a state, such as a count of its calls or a "
    "running mean of its inputs. An example alone then has another gradient than in a "
    "batch, so the norms could not be compared. Switch random numbers or a count off "
    "for the audit. Remove a state that is computed from inputs: through it, examples "
    "of earlier batches act on later outputs without clipping and without noise."
)
_NOT_FINITE = (
    "The gradient of {which} alone is infinite or NaN, and those of the other "
    "{num_others} are not. Look at what the data set returns there: NaN or infinite "
    "values in the input or in the label make every weight NaN after one update. "
    "Correct or leave out such items."
)
_ALL_NOT_FINITE = (
    "The gradient of every example alone is infinite or NaN. Look at the weights, the "
    "inputs and the loss: one of them has infinite or NaN values for every example."
)
_NUM_NAMED = 5  # examples that a message lists
_STATES = {True: "ok", False: "FAILED", None: "unknown"}
_PASSED = {"checked": True, "unchecked": None, "broken": False}


@dataclass(frozen=True)
class AuditRow:
    """One comparison of an audit.

    Attributes:
        name: ``"norms"``, ``"loss"``, ``"model"``, ``"order"`` or ``"batch"``.
        passed: Whether the two sides agree; None if they could not be compared.
        sentence: What was compared and what was found, with the remedy if it failed.
    """

    name: str
    passed: bool | None
    sentence: str


@dataclass(frozen=True)
class Audit:
    """The result of an audit; ``print`` shows it as a table.

    Attributes:
        mode: The ``grad_sample_mode`` that was audited, or ``"swept"``.
        num_examples: How many examples were differentiated alone.
        rows: The comparisons.
        recorded: The norms that are recorded, float64 ``(num_examples,)``.
        expected: The norms of the examples alone, float64 ``(num_examples,)``.
    """

    mode: str
    num_examples: int
    rows: tuple[AuditRow, ...]
    recorded: Tensor
    expected: Tensor

    @property
    def passed(self) -> bool:
        """Return whether no comparison failed."""
        return all(row.passed is not False for row in self.rows)

    def __getitem__(self, name: str) -> AuditRow:
        """Return the row with this name."""
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        head = f"Audit of {self.num_examples} examples, mode {self.mode!r}: {verdict}"
        lines = [
            f"  {row.name:6} {_STATES[row.passed]:9} {row.sentence}"
            for row in self.rows
        ]
        return "\n".join([head, *lines])


def audit_batch(
    model: nn.Module,
    criterion: Any,
    batch: Any,
    *,
    run: AuditedRun,
    new_engine: Callable[[Recorder], Any],
    places: Sequence[int] | None = None,
) -> Audit:
    """Audit one batch.

    Args:
        model: The model, plain or wrapped; it is copied.
        criterion: As the training loop calls it on outputs and targets; it is copied.
        batch: ``(x, y)``, or a dict with ``"labels"``.
        run: How the batch is trained on.
        new_engine: Returns an engine that reports to a recorder.
        places: Positions of the examples in the data set; None: not known.

    Raises:
        ValueError: If the batch has fewer than two examples, the mode leaves the
            gradients to the training loop, a copy of the model computes with the
            parameters of the original, or the criterion calls the model; or if the
            model fails on the batch, or the criterion on its outputs.
    """
    expect(
        run.mode != "no_op",
        "grad_sample_mode",
        "'no_op'",
        "must be one that computes per-example gradients",
        "With 'no_op' the training loop computes them. Call opacus_pi.audit(model, "
        "criterion, batch), which audits model and criterion in another mode.",
    )
    x, y = to_device(inputs_and_targets(batch), device_of(model))
    size, dim = num_examples(y), run.batch_dim
    _require_several(size)
    warn_of_copied_labels(criterion, x, y)
    with measuring(), uncalled_by_criterion(model):
        loss = TrainedLoss(criterion, run)
        outputs, precision = outputs_of_batch(quiet_copy(model, run), x)
        rounding = rounding_of(model, precision)
        expected, no_norms = _norms_alone(model, loss, x, y, run, outputs)

        def norms_of(places: Sequence[int]) -> Tensor:
            chosen = rows_of((x, y), places, size, dim)
            return recorded_norms(model, loss, chosen, run, new_engine)

        recorded, failed = _recorded(
            lambda: recorded_norms(model, loss, (x, y), run, new_engine), run.mode
        )
        row_of_norms = (
            failed or no_norms or _compare_norms(recorded, expected, rounding, places)
        )
        rows: tuple[AuditRow, ...] = (
            row_of_norms,
            _compare_loss(loss, outputs, y, run),
            _model_row(quiet_copy(model, run), x, run),
            _order_row(recorded, size, norms_of, rounding),
        )
        repeated, tolerance = quiet_copy(model, run), rounding * 1e-2
        if what := changing_part(repeated, loss, x, y, tolerance):
            rows = _not_compared(rows, what)
        elif (
            row_of_norms.passed is False
            and no_norms is None
            and bool(recorded.isfinite().all())
        ):
            quiet = quiet_copy(model, run)
            alone = compare_alone(quiet, x, outputs, size, dim, rounding)
            rows = _with_outputs_alone(rows, alone)
    return Audit(run.mode, size, rows, recorded, expected)


def _require_several(size: int) -> None:
    """Raise unless a batch has examples that could influence each other.

    Args:
        size: The number of examples.

    Raises:
        ValueError: If there are fewer than two.
    """
    expect(
        size > 1,
        "batch",
        f"{size} examples",
        "must have at least 2 examples",
        "Pass a larger batch: one example alone does not show whether examples "
        "influence each other.",
    )


def _recorded(
    update: Callable[[], Tensor], mode: str
) -> tuple[Tensor, AuditRow | None]:
    """Return the norms that an update records, ``(b,)``, and None.

    Args:
        update: Makes the update and returns its norms.
        mode: The ``grad_sample_mode``.

    Returns:
        If the update fails, no norm, and a row that says why.

    Raises:
        ValueError: About an argument.
    """
    try:
        return update(), None
    except (RuntimeError, TypeError, ValueError) as error:  # as in training
        if isinstance(error, ValueError) and not notes_of(error):
            raise
        row = AuditRow("norms", False, failed_update(error, mode))
        return torch.empty(0, dtype=torch.float64), row


def _norms_alone(
    model: nn.Module, loss: TrainedLoss, x: Any, y: Any, run: AuditedRun, outputs: Any
) -> tuple[Tensor, AuditRow | None]:
    """Return the norms of the examples alone, ``(b,)``, all NaN if they have none.

    Args:
        model: The model.
        loss: The criterion.
        x: Inputs of b examples.
        y: Their targets.
        run: How they are trained on.
        outputs: What the model returns for the inputs.

    Returns:
        The norms, and None; or NaN, and a row that says why there are none.

    Raises:
        ValueError: If the criterion cannot be called on the outputs.
    """
    try:
        return norms_of_copy(model, loss, x, y, run), None
    except MODEL_ERRORS:
        require_fitting(loss, outputs, y)
        found = failure_alone(quiet_copy(model, run), loss, x, y, run.batch_dim)
        if found is None:
            raise
        nothing = torch.full((num_examples(y),), torch.nan, dtype=torch.float64)
        return nothing, AuditRow("norms", _PASSED[found.state], found.sentence)


def _with_outputs_alone(
    rows: tuple[AuditRow, ...], finding: Finding | None
) -> tuple[AuditRow, ...]:
    """Return rows of which "model" says what the outputs for single examples show.

    Args:
        rows: The rows of an audit in which the norms differ.
        finding: What they show; None: nothing.
    """
    if finding is None:
        return rows
    found = AuditRow("model", _PASSED[finding.state], finding.sentence)
    return tuple(
        found if row.name == "model" and row.passed is not False else row
        for row in rows
    )


def _not_compared(rows: tuple[AuditRow, ...], what: str) -> tuple[AuditRow, ...]:
    """Return rows in which norms are not compared, nor is the loss if it changes.

    Args:
        rows: The rows of an audit.
        what: The part that gives other values when it is called again.
    """
    sentence = _NOT_REPEATABLE.format(what=what)
    names = {"norms", "order"} | ({"loss"} if what == "The criterion" else set())
    return tuple(
        AuditRow(row.name, None, sentence) if row.name in names else row for row in rows
    )


def _not_finite(expected: Tensor, places: Sequence[int] | None) -> str:
    """Name the examples whose own gradient is infinite or NaN; empty if there is none.

    Args:
        expected: Norms of the examples alone, ``(b,)``.
        places: Positions of the examples in the data set; None: not known.
    """
    odd = (~torch.isfinite(expected)).nonzero().flatten().tolist()
    if not odd:
        return ""
    if len(odd) == len(expected):
        return _ALL_NOT_FINITE
    named = [i if places is None else places[i] for i in odd]
    listed = ", ".join(map(str, named[:_NUM_NAMED]))
    more = f" and {len(named) - _NUM_NAMED} more" * (len(named) > _NUM_NAMED)
    where = "the batch" if places is None else "the data set"
    which = f"example{'s' * (len(named) > 1)} {listed}{more} of {where}"
    return _NOT_FINITE.format(which=which, num_others=len(expected) - len(odd))


def joined(audits: Sequence[Audit]) -> Audit:
    """Join the audits of several batches: keep the worst row of each comparison.

    Args:
        audits: At least one.
    """
    order = (False, None, True)
    rows = [
        min(found, key=lambda row: order.index(row.passed))
        for found in zip(*(audit.rows for audit in audits), strict=True)
    ]
    return Audit(
        audits[0].mode,
        sum(audit.num_examples for audit in audits),
        tuple(rows),
        torch.cat([audit.recorded for audit in audits]),
        torch.cat([audit.expected for audit in audits]),
    )


def _compare_norms(
    recorded: Tensor, expected: Tensor, rounding: float, places: Sequence[int] | None
) -> AuditRow:
    """Compare the recorded norms with those of the examples alone.

    Args:
        recorded: float64 ``(b,)``.
        expected: Norms of the examples alone, ``(b,)``.
        rounding: The difference that rounding may cause.
        places: Positions of the examples in the data set; None: not known.
    """
    problem = _not_finite(expected, places)
    if problem and not recorded.isfinite().all():  # else a loss alone has no mean
        return AuditRow("norms", False, problem)
    if len(recorded) != len(expected):
        text = _OTHER_NUMBER.format(num=len(recorded), size=len(expected))
        return AuditRow("norms", False, text)
    if recorded.isnan().any():
        return AuditRow("norms", None, _NO_NORMS)
    gap = largest_gap(recorded, expected)
    if gap <= rounding:
        return AuditRow(
            "norms",
            True,
            "The recorded norms are those of each example's own gradient (largest "
            f"relative difference {gap:.1g}).",
        )
    return AuditRow(
        "norms",
        False,
        "The recorded norms are not those of each example's own gradient"
        f"{_difference(recorded, expected)}. If no row below says why, the "
        "per-example gradients of one of the layers may be wrong, or a hook changes "
        "gradients. In this case another grad_sample_mode of make_private may help: "
        "use it and audit again.",
    )


def _difference(recorded: Tensor, expected: Tensor) -> str:
    """Say how recorded norms compare with the right ones.

    Args:
        recorded: float64 ``(b,)``.
        expected: Norms of the examples alone, ``(b,)``.
    """
    if not bool((expected > 0).all()):
        return ", which is 0 for some of them"
    return f": they are {times_as_large(recorded, expected)}"


def _compare_loss(loss: TrainedLoss, outputs: Any, y: Any, run: AuditedRun) -> AuditRow:
    """Compare the loss of the batch with the mean or the sum of the own losses."""
    size = num_examples(y)
    parts = [rows_of((outputs, y), [i], size, run.batch_dim) for i in range(size)]
    try:
        whole, *alone = [float(loss(*part)) for part in [(outputs, y), *parts]]
    except CoupledLoss as error:
        return AuditRow("loss", False, str(error))
    if not math.isfinite(whole):  # the row of the norms says which example it is
        return AuditRow("loss", None, _NO_LOSS)
    found = {"mean": sum(alone) / len(alone), "sum": sum(alone)}
    scale = max(map(abs, alone), default=0.0) * 1e-4
    fits = [how for how, value in found.items() if abs(whole - value) <= scale]
    wanted = run.loss_reduction
    if wanted in fits or (run.is_swept and fits):
        coupling = loss.coupling(y)  # where this batch has one class only, for example
        if coupling:
            return AuditRow("loss", False, coupling)
        how = wanted if wanted in fits else fits[0]
        text = f"The loss of the batch is the {how} of the examples' own losses."
        return AuditRow("loss", True, text)
    if fits:
        return AuditRow(
            "loss",
            False,
            f"The criterion returns the {fits[0]} of the examples' losses, but "
            f'make_private was given loss_reduction="{wanted}". Pass '
            f'loss_reduction="{fits[0]}".',
        )
    coupled = (
        f"The loss of the batch, {whole:.4g}, is neither the mean nor the sum of the "
        f"examples' own losses ({found['mean']:.4g}, {found['sum']:.4g}). The "
        "criterion uses a quantity of the whole batch, or compares examples with "
        "each other. Train with a loss that is the mean of one loss for each example."
    )
    return AuditRow("loss", False, loss.coupling(y) or coupled)


def _model_row(model: nn.Module, x: Any, run: AuditedRun) -> AuditRow:
    """Say whether the outputs for one example depend on others."""
    args, kwargs = arguments(x)
    finding = probe_separability(
        model,
        args,
        kwargs,
        batch_dim=run.batch_dim,
        layers_in_order=not run.is_swept,
    )
    return AuditRow("model", _PASSED[finding.state], finding.sentence)


def _order_row(
    recorded: Tensor,
    size: int,
    norms_of: Callable[[Sequence[int]], Tensor],
    rounding: float,
) -> AuditRow:
    """Compare the recorded norms with those of the batch in reverse order.

    A model that packs sorted sequences fails on the reverse order. Then the last
    example is left out, which keeps the order of the others.

    Args:
        recorded: The norms of the batch, ``(b,)``.
        size: The number of examples.
        norms_of: Returns the norms of one update on the examples in some places.
        rounding: The difference that rounding may cause.
    """
    if not len(recorded) or not recorded.isfinite().all():
        return AuditRow("order", None, _NO_NORMS)
    try:
        reverse = norms_of(range(size - 1, -1, -1)).flip(0)
    except MODEL_ERRORS as error:
        return _without_last_row(recorded, size, norms_of, rounding, error)
    if _are_equal(recorded, reverse, rounding):
        return AuditRow(
            "order", True, "The order of the examples in the batch does not matter."
        )
    return AuditRow(
        "order",
        False,
        "With the same examples in reverse order, other norms are recorded. So a norm "
        "belongs to a position in the batch and not to an example. Look for a layer "
        "or a loss that depends on the position in the batch.",
    )


def _without_last_row(
    recorded: Tensor,
    size: int,
    norms_of: Callable[[Sequence[int]], Tensor],
    rounding: float,
    error: Exception,
) -> AuditRow:
    """Compare the recorded norms with those of the batch without its last example.

    Args:
        recorded: The norms of the batch, ``(b,)``.
        size: The number of examples.
        norms_of: Returns the norms of one update on the examples in some places.
        rounding: The difference that rounding may cause.
        error: What an update on the reverse order raised.
    """
    name = type(error).__name__
    why = f"The model fails on the examples in reverse order ({name}), as models do "
    why += "that pack sorted sequences. So the last example was left out instead. "
    try:
        others = norms_of(range(size - 1))
    except MODEL_ERRORS:
        return AuditRow("order", None, why + "The model failed there, too.")
    if _are_equal(recorded[:-1], others, rounding):
        text = "The norms of the others stayed the same."
        return AuditRow("order", True, why + text)
    text = (
        "The norms of the others changed, so they are not those of single examples. "
        "Look for a layer or a loss that depends on the other examples."
    )
    return AuditRow("order", False, why + text)


def _are_equal(one: Tensor, other: Tensor, rounding: float) -> bool:
    """Return whether norms are equally many and equal up to rounding."""
    return len(one) == len(other) and largest_gap(one, other) <= rounding


def finding_of(row: AuditRow) -> Finding:
    """Return what a row says about a link of the chain of custody."""
    states: dict[bool | None, Any] = {True: "checked", None: "unchecked"}
    return Finding(states.get(row.passed, "broken"), f"engine.audit: {row.sentence}")
