"""Compare what is recorded for a batch with the gradients of its examples alone.

An audit answers one question before a training run is trusted: is a recorded norm the
norm of one example's own gradient? It trains a copy of the model for one update on a
few examples, exactly as the engine does, and differentiates each of these examples
alone by plain autograd. Four things are compared:

* ``norms``: the recorded norms, with those of the examples alone;
* ``loss``: the loss of the batch, with the mean or the sum of the examples' own losses;
* ``model``: the outputs for some examples, before and after others are replaced;
* ``order``: the recorded norms, with those of the batch in reverse order.

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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from opacus_pi._validate import expect
from opacus_pi.custody.finding import Finding
from opacus_pi.custody.function_copies import copied_if_possible
from opacus_pi.custody.model_probe import probe_separability
from opacus_pi.custody.probed_call import NoDropout
from opacus_pi.gradients import per_example_grad_norms
from opacus_pi.integration.failed_updates import failed_update
from opacus_pi.integration.repeated_calls import changing_part
from opacus_pi.integration.schedules import user_collate_fn
from opacus_pi.models.batches import (
    arguments,
    device_of,
    floating,
    forward,
    inputs_and_targets,
    logits_of,
    rows_of,
    size_of,
    to_device,
)
from opacus_pi.models.copies import graph_leaves, independent_copy, training_copy
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.own_generators import OwnGenerators
from opacus_pi.models.own_losses import CoupledLoss, Criterion, OwnLosses
from opacus_pi.recording import Recorder

__all__ = [
    "Audit",
    "AuditRow",
    "AuditedRun",
    "OutputGradients",
    "TrainedLoss",
    "audit_batch",
    "audited_run",
    "finding_of",
    "joined",
    "largest_gap",
    "measuring",
    "norms_alone",
    "norms_of_update",
    "quiet_copy",
    "rounding_of",
    "times_as_large",
    "user_criterion",
]

_MAX_EXAMPLES = 32  # of one batch: each is differentiated alone
_SWEPT = "swept"  # in place of a grad_sample_mode: norms of a sweep
_OTHER_NUMBER = (
    "{num} norms were recorded for {size} examples, so they cannot be compared. This "
    "happens if a layer is not given exactly one row for each example: it gets only "
    "some of the examples (a model that routes them), or several rows for each (two "
    "views of an example). Give every layer all examples, and choose between outputs "
    "with torch.where. Put several views along another dimension than the first."
)
_NOT_REPEATABLE = (
    "{what} returns other values when it is called again on the same examples: it "
    "draws random numbers, or it counts its calls. An example alone then has another "
    "gradient than in a batch, so the norms could not be compared. Switch the random "
    "numbers or the counting off for the audit."
)
_STATES = {True: "ok", False: "FAILED", None: "unknown"}


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


@dataclass(frozen=True)
class Examples:
    """Source of the batches of an audit.

    Attributes:
        data_set: The training set.
        collate_fn: Makes a batch of a list of examples; None: torch's own.
        batch_size: The expected number of examples of a batch.
        is_batched: Whether ``collate_fn`` is given a batch, which the data set makes of
            a list of indices, as with ``DataLoader(data_set, batch_size=None,
            sampler=BatchSampler(...))``.
    """

    data_set: Dataset[Any]
    collate_fn: Callable[[Any], Any] | None
    batch_size: int
    is_batched: bool = False

    def batches(self, num_batches: int) -> Iterator[Any]:
        """Yield batches of different examples, as training would collate them.

        Args:
            num_batches: As for ``items``.
        """
        for items in self.items(num_batches):
            yield self.collated(items)

    def collated(self, items: list[Any]) -> Any:
        """Return a batch of items, collated by a copy of ``collate_fn`` if possible.

        Args:
            items: Of the data set; ``collate_fn`` may change them.
        """
        collate = copied_if_possible(self.collate_fn or default_collate)
        with isolated(), OwnGenerators():
            return collate(default_collate(items) if self.is_batched else items)

    def items(self, num_batches: int) -> Iterator[list[Any]]:
        """Yield lists of different examples, in a random order with a fixed seed.

        The order comes from a new generator, so no global random state changes.

        Args:
            num_batches: The number of lists; fewer are made if the data set has too
                few examples.
        """
        num_examples = size_of(self.data_set)
        size = min(_MAX_EXAMPLES, max(2, self.batch_size), num_examples)
        order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
        for start in range(0, min(num_batches * size, num_examples - 1), size):
            chosen = order[start : start + size].tolist()
            with isolated(), OwnGenerators():
                items = [self.data_set[index] for index in chosen]
            yield items


@dataclass(frozen=True)
class AuditedRun:
    """The parts of a prepared run that an audit repeats.

    Attributes:
        mode: The ``grad_sample_mode``, or ``"swept"``.
        loss_reduction: The ``loss_reduction`` that ``make_private`` was given.
        batch_first: Whether examples are along the first dimension.
        examples: Where batches come from; None if they are given.
    """

    mode: str = "hooks"
    loss_reduction: str = "mean"
    batch_first: bool = True
    examples: Examples | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce to what a copy of the engine has: it has no run to be audited.

        Nor can every data set and ``collate_fn`` be pickled.
        """
        return AuditedRun, (self.mode, self.loss_reduction, self.batch_first)

    @property
    def is_swept(self) -> bool:
        """Whether norms are measured by sweeps, and not where training clips."""
        return self.mode == _SWEPT

    @property
    def batch_dim(self) -> int:
        """The dimension of the inputs along which the examples are."""
        return 0 if self.batch_first else 1


def audited_run(
    loader: DataLoader[Any],
    *,
    recorder: Recorder,
    grad_sample_mode: str = "hooks",
    loss_reduction: str = "mean",
    batch_first: bool = True,
    **_: Any,
) -> AuditedRun:
    """Return what an audit repeats of a run that was prepared.

    Args:
        loader: The loader that training will iterate over.
        recorder: The engine's recorder.
        grad_sample_mode: As it was passed to ``make_private``.
        loss_reduction: As it was passed to ``make_private``.
        batch_first: As it was passed to ``make_private``.
        **_: Its other options.
    """
    batch_size = math.ceil(size_of(loader.dataset) / len(loader))
    is_batched = loader.batch_sampler is None
    return AuditedRun(
        _SWEPT if recorder.mode == _SWEPT else grad_sample_mode,
        loss_reduction,
        batch_first,
        Examples(loader.dataset, user_collate_fn(loader), batch_size, is_batched),
    )


def audit_batch(
    model: nn.Module,
    criterion: Any,
    batch: Any,
    *,
    run: AuditedRun,
    new_engine: Callable[[Recorder], Any],
) -> Audit:
    """Audit one batch.

    Args:
        model: The model, plain or wrapped; it is copied.
        criterion: As the training loop calls it on outputs and targets; it is copied.
        batch: ``(x, y)``, or a dict with ``"labels"``.
        run: How the batch is trained on.
        new_engine: Returns an engine that reports to a recorder.

    Raises:
        ValueError: If the batch has fewer than two examples, or the mode leaves the
            gradients to the training loop.
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
    expect(
        len(y) > 1,
        "batch",
        f"{len(y)} examples",
        "must have at least 2 examples",
        "Pass a larger batch: one example alone does not show whether examples "
        "influence each other.",
    )
    loss = TrainedLoss(criterion, run)
    with measuring():
        expected = norms_alone(quiet_copy(model, run), loss, x, y, run.batch_dim)
        size, dim = len(y), run.batch_dim
        turned = rows_of((x, y), range(size - 1, -1, -1), size, dim)
        try:
            recorded = _recorded_norms(model, loss, (x, y), run, new_engine)
            reverse = _recorded_norms(model, loss, turned, run, new_engine).flip(0)
            row_of_norms = _compare_norms(recorded, expected, model)
        except (RuntimeError, TypeError) as error:  # as in training
            recorded = reverse = torch.empty(0, dtype=torch.float64)
            text = failed_update(error, run.mode)
            row_of_norms = AuditRow("norms", False, text)
        outputs = forward(quiet_copy(model, run), x)
        rows: tuple[AuditRow, ...] = (
            row_of_norms,
            _compare_loss(loss, outputs, y, run),
            _model_row(quiet_copy(model, run), x, run),
            _compare_order(recorded, reverse, model),
        )
        repeated, tolerance = quiet_copy(model, run), rounding_of(model) * 1e-2
        what = changing_part(repeated, loss, x, y, tolerance)
        rows = _not_compared(rows, what) if what else rows
    return Audit(run.mode, len(y), rows, recorded, expected)


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


class TrainedLoss:
    """The criterion as training uses it: one number for a batch, or for one example.

    A copy of the criterion is called, with the state that it has now, such as buffers
    and counters: the criterion of the training stays as it is.

    Args:
        criterion: Returns one number, or one loss for each example, which training
            then reduces as ``make_private`` was asked to.
        run: How the batch is trained on.
    """

    def __init__(self, criterion: Any, run: AuditedRun) -> None:
        self.criterion = criterion = copied_if_possible(user_criterion(criterion))
        self._reduction = run.loss_reduction
        is_ghost = run.mode.startswith("ghost")
        self._losses: Criterion | None = None
        if is_ghost:  # which reduces the examples' losses itself
            self._losses = OwnLosses(criterion, averages_each_example=True)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch, a scalar.

        Raises:
            CoupledLoss: If the examples have no losses of their own. Only in the ghost
                modes, where this is known without a comparison.
        """
        evaluate = self._losses or self.criterion
        values = cast(Tensor, evaluate(outputs, targets))
        if values.dim() == 0:
            return values
        return values.mean() if self._reduction == "mean" else values.sum()


def user_criterion(criterion: Any) -> Any:
    """Return the criterion that the user made.

    Args:
        criterion: The same, or what ghost clipping made of it.
    """
    if isinstance(criterion, DPLossFastGradientClipping):
        return criterion.criterion
    return criterion


def quiet_copy(model: nn.Module, run: AuditedRun) -> nn.Module:
    """Return a copy of the model in the mode in which it is measured.

    Args:
        model: The model.
        run: How it is trained. A sweep measures in evaluation mode.
    """
    if run.mode == _SWEPT:
        return independent_copy(model)
    copied = training_copy(model)
    if not copied.training:  # otherwise single layers stay in evaluation mode
        copied.train()
    for module in copied.modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0
    return copied


def norms_alone(
    model: nn.Module, loss: TrainedLoss, x: Any, y: Any, dim: int
) -> Tensor:
    """Return the norm of each example's gradient, one after the other by autograd.

    Args:
        model: A copy of the model.
        loss: The criterion.
        x: Inputs of b examples.
        y: Their targets.
        dim: The dimension of the inputs along which the examples are.

    Returns:
        float64 ``(b,)`` on the CPU.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(y)):
        one, target = rows_of((x, y), [i], len(y), dim)
        value = loss(forward(model, one), target)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        norms.append(torch.stack(squares).sum().sqrt().cpu())
    return torch.stack(norms)


class _ListeningRecorder(Recorder):
    """Keeps the norms that an optimizer reports, also if the ledger is refused."""

    def __init__(self) -> None:
        super().__init__(probe_model=False)
        self.norms = torch.empty(0)

    def report(self, indices: Any, grad_norms: Tensor) -> None:
        """Keep the norms of the only batch."""
        self.norms = grad_norms.detach().double().cpu()
        super().report(indices, grad_norms)


def _recorded_norms(
    model: nn.Module,
    loss: TrainedLoss,
    batch: tuple[Any, Any],
    run: AuditedRun,
    new_engine: Callable[[Recorder], Any],
) -> Tensor:
    """Train a copy for one update without noise or step size, and return the norms.

    Args:
        model: The model.
        loss: The criterion.
        batch: Inputs and targets of b examples.
        run: How they are trained on.
        new_engine: Returns an engine that reports to a recorder.

    Returns:
        float64 ``(b,)`` on the CPU.
    """
    size = len(batch[1])
    if run.mode == _SWEPT:
        try:
            return per_example_grad_norms(model, loss.criterion, *batch).cpu()
        except CoupledLoss:  # which the row of the loss explains
            return torch.full((size,), torch.nan, dtype=torch.float64)
    x, y = batch
    quiet = quiet_copy(model, run)
    return norms_of_update(quiet, loss, (*arguments(x), y), run, new_engine)[0]


def norms_of_update(
    copied: nn.Module,
    loss: TrainedLoss,
    batch: tuple[tuple[Any, ...], dict[str, Any], Any],
    run: AuditedRun,
    new_engine: Callable[[Recorder], Any],
    surroundings: AbstractContextManager[None] | None = None,
) -> tuple[Tensor, Any, "OutputGradients"]:
    """Train a copy of a model for one update without noise or step size.

    Args:
        copied: The copy, which is changed.
        loss: The criterion.
        batch: Positional inputs, inputs by keyword, and targets of b examples.
        run: How they are trained on.
        new_engine: Returns an engine that reports to a recorder.
        surroundings: Entered for the forward pass and the loss.

    Returns:
        The recorded norms, float64 ``(b,)`` on the CPU; the outputs; and the gradients
        of the loss with respect to them.
    """
    size, recorder = len(batch[2]), _ListeningRecorder()
    is_ghost = run.mode.startswith("ghost")
    options = {"criterion": loss.criterion} if is_ghost else {}
    wrapped, optimizer, *criterion, loader = new_engine(recorder).make_private(
        module=copied,
        optimizer=torch.optim.SGD(copied.parameters(), lr=0.0),
        data_loader=DataLoader(range(size), size, collate_fn=lambda _: batch),  # type: ignore[arg-type]  # torch: a range is map-style
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=run.mode,
        loss_reduction=run.loss_reduction,
        batch_first=run.batch_first,
        **options,
    )
    outputs, gradients = None, OutputGradients(None)
    for args, kwargs, targets in loader:
        optimizer.zero_grad()
        with surroundings or nullcontext():
            outputs = wrapped(*args, **kwargs)
            gradients = OutputGradients(outputs)
            evaluate = criterion[0] if criterion else loss
            value = evaluate(logits_of(outputs), targets)
        with _gradients_untouched(value, copied):
            value.backward()
        optimizer.step()
    return recorder.norms, outputs, gradients


@contextmanager
def _gradients_untouched(value: Any, copied: nn.Module) -> Iterator[None]:
    """Keep the ``.grad`` of all tensors outside a copy, such as a criterion's weights.

    Args:
        value: The loss; with ghost clipping, what holds the losses of the examples.
        copied: The copy, whose gradients are wanted.
    """
    own = {id(p) for p in copied.parameters()}
    leaves = graph_leaves(getattr(value, "loss_per_sample", value))
    # Expanded weights, which stand for the copy's own, are neither of the two types.
    plain = (leaf for leaf in leaves if type(leaf) in (Tensor, nn.Parameter))
    others = [(leaf, leaf.grad) for leaf in plain if id(leaf) not in own]
    for leaf, _ in others:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in others:
            leaf.grad = gradient


class OutputGradients:
    """The gradients that the first backward pass brings to the outputs of a model.

    Ghost clipping has a second backward pass, with other weights of the examples. The
    gradients are those after all hooks that the loop has put on the outputs.

    Args:
        outputs: Tensors in any nesting; None: none.
    """

    def __init__(self, outputs: Any) -> None:
        self._found: dict[int, Tensor] = {}
        for place, tensor in enumerate(floating(outputs).values()):
            if tensor.grad_fn is not None:
                saw = partial(self._saw, place, tensor.output_nr)
                tensor.grad_fn.register_prehook(saw)

    def _saw(self, place: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Keep a copy of the gradient of one output.

        Args:
            place: The position of the output.
            number: Its position among the results of the operation that computed it.
            gradients: The gradients of these results.
        """
        gradient = gradients[number]
        if gradient is not None:
            self._found.setdefault(place, gradient.detach().clone())

    def by_example(self, size: int, dim: int) -> Tensor:
        """Return the gradients of all outputs, float64 ``(b, k)`` on the CPU.

        Args:
            size: The number of examples, b.
            dim: The dimension along which they are, as in ``rows_of``.
        """
        parts = [torch.empty(size, 0, dtype=torch.float64)]
        for _, gradient in sorted(self._found.items()):
            along = [d for d in (dim, 0, 1) if gradient.shape[d : d + 1] == (size,)]
            if along:
                rows = gradient.movedim(along[0], 0).reshape(size, -1)
                parts.append(rows.double().cpu())
        return torch.cat(parts, dim=1)


def _compare_norms(recorded: Tensor, expected: Tensor, model: nn.Module) -> AuditRow:
    """Compare the recorded norms with those of the examples alone."""
    if len(recorded) != len(expected):
        text = _OTHER_NUMBER.format(num=len(recorded), size=len(expected))
        return AuditRow("norms", False, text)
    if recorded.isnan().any():
        return AuditRow("norms", None, "There are no norms to compare.")
    gap = largest_gap(recorded, expected)
    if gap <= rounding_of(model):
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
        "per-example gradients of one of the layers are wrong. In training with "
        "make_private, use another grad_sample_mode and audit again.",
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


def times_as_large(norms: Tensor, expected: Tensor) -> str:
    """Say how many times as large as others norms are: the range over the examples.

    Args:
        norms: float64 ``(b,)``.
        expected: The others, ``(b,)``; values below 1e-300 count as 1e-300.
    """
    ratios = norms / expected.clamp(min=1e-300)
    low, high = (f"{float(one):.3g}" for one in (ratios.min(), ratios.max()))
    return f"{low if low == high else f'{low} to {high}'} times as large"


def _compare_loss(loss: TrainedLoss, outputs: Any, y: Any, run: AuditedRun) -> AuditRow:
    """Compare the loss of the batch with the mean or the sum of the own losses."""
    size = len(y)
    parts = [rows_of((outputs, y), [i], size, run.batch_dim) for i in range(size)]
    try:
        whole, *alone = [float(loss(*part)) for part in [(outputs, y), *parts]]
    except CoupledLoss as error:
        return AuditRow("loss", False, str(error))
    found = {"mean": sum(alone) / len(alone), "sum": sum(alone)}
    scale = max(map(abs, alone), default=0.0) * 1e-4
    fits = [how for how, value in found.items() if abs(whole - value) <= scale]
    wanted = run.loss_reduction
    if wanted in fits or (run.mode == _SWEPT and fits):
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
    return AuditRow(
        "loss",
        False,
        f"The loss of the batch, {whole:.4g}, is neither the mean nor the sum of the "
        f"examples' own losses ({found['mean']:.4g}, {found['sum']:.4g}). The "
        "criterion uses a quantity of the whole batch, or compares examples with "
        "each other. Train with a loss that is the mean of one loss for each example.",
    )


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
    states = {"checked": True, "unchecked": None, "broken": False}
    return AuditRow("model", states[finding.state], finding.sentence)


def _compare_order(recorded: Tensor, reverse: Tensor, model: nn.Module) -> AuditRow:
    """Compare the recorded norms with those of the batch in reverse order."""
    if not len(recorded) or recorded.isnan().any():
        return AuditRow("order", None, "There are no norms to compare.")
    same_size = len(recorded) == len(reverse)
    if same_size and largest_gap(recorded, reverse) <= rounding_of(model):
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


def finding_of(row: AuditRow) -> Finding:
    """Return what a row says about a link of the chain of custody."""
    states: dict[bool | None, Any] = {True: "checked", None: "unchecked"}
    return Finding(states.get(row.passed, "broken"), f"engine.audit: {row.sentence}")


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two norms, relative to the largest norm.

    Infinity if a norm is not finite.
    """
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    scale = float(torch.maximum(one, other).max())
    return float((one - other).abs().max()) / max(scale, 1e-300)


def rounding_of(model: nn.Module) -> float:
    """Return the relative difference of norms that rounding may cause."""
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    rounding = max((torch.finfo(kind).eps for kind in kinds), default=1e-7)
    is_cpu = device_of(model).type == "cpu"
    return max(1e-3 if is_cpu else 1e-2, 32 * rounding)


@contextmanager
def measuring(*, drops: bool = False) -> Iterator[None]:
    """Restore random states and switches at the end, and show no warnings.

    Args:
        drops: Whether torch's dropout functions drop anything.
    """
    calm = nullcontext() if drops else NoDropout()
    with isolated(), OwnGenerators(), calm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
