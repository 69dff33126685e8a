"""Gradient norms of one batch, or of a whole data set in one pass (a sweep).

A sweep also returns the confidence, error (EL2N) and correctness of each prediction,
from the same forward pass. Forget sets can be chosen by them as well as by norms.

A sweep leaves no trace: weights, gradients, hooks, train/eval flags, buffers, the
optimizer and all random number generators stay bit for bit as they were. The data set's
own ``__getitem__`` runs under random states that are restored afterwards. What breaks
this: a data set that changes itself when it is read.

Inside a context of joblib, :func:`sweep` shares the work among its workers
(:mod:`~opacus_pi.gradients.joblib_workers`); :func:`measured` measures in this process.

>>> data = [(torch.tensor([3.0, 4.0]), 0), (torch.tensor([0.0, 0.0]), 0)]
>>> norm_sweep(nn.Linear(2, 1, bias=False), lambda outputs, y: outputs[:, 0], data)
tensor([5., 0.], dtype=torch.float64)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from opacus_pi._validate import expect, in_range, positive
from opacus_pi.gradients.joblib_workers import (
    num_joblib_workers,
    run_in_workers,
    runs_of_batches,
)
from opacus_pi.gradients.kept_engine import kept_engine
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.gradients.sweep_batches import SMALLEST, examples_at_once, in_halves
from opacus_pi.models.batches import (
    inputs_and_targets,
    num_examples,
    size_of,
    to_device,
)
from opacus_pi.models.collating import Collating
from opacus_pi.models.copies import evaluation_copy
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.own_losses import Criterion

_SECONDS_BEFORE_BAR = 3.0  # a short sweep shows no progress bar


def per_example_grad_norms(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
) -> Tensor:
    r"""Return the L2 norm of the gradient of each example's own loss.

    :math:`\|\nabla_\theta \ell(f_\theta(x_i), y_i)\|_2` over all trainable parameters
    together, with the model in evaluation mode (no dropout, running BatchNorm
    statistics). Norms are neither divided by the batch size nor clipped. The model
    stays as it is.

    In a loop over batches, or over the steps of a training, the first call takes
    longest: it copies the model and checks its norms by plain autograd. The calls that
    follow with the same model and criterion use what it has prepared, unless layers,
    attributes, hooks or ``requires_grad`` have changed since.

    Args:
        model: A plain module, or one wrapped by Opacus or for distributed training.
        criterion: ``criterion(outputs, targets)`` with one loss per example; a torch
            loss module may have any reduction (it is copied).
        x: Inputs: a tensor ``(b, ...)``, or a tuple or dict of them, handed over as
            ``model(*x)`` or ``model(**x)``. On the model's device.
        y: Targets, length ``b``, on the model's device.

    Returns:
        float64 ``(b,)``.

    Raises:
        ValueError: If the criterion does not give one loss per example, nothing is
            trainable, or examples share batch statistics.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
        >>> per_example_grad_norms(model, lambda outputs, y: outputs[:, 0], x, [0])
        tensor([5.], dtype=torch.float64)
    """
    with isolated(), kept_engine(model, criterion, x, y) as engine:
        squares, _ = engine.squares(x, y)
    return squares.sqrt()


@dataclass(frozen=True)
class Sweep:
    """Measurements of one pass over a data set, in the data set's order.

    Attributes:
        grad_norms: L2 norms of the gradients of each example's own loss, float64
            ``(n,)``.
        confidences: Softmax probability of the label, float64 ``(n,)``. This field and
            the next two are ``None`` unless outputs are logits ``(b, classes)`` and
            targets are whole numbers.
        errors: EL2N, the L2 norm of softmax minus one-hot label (Paul et al. 2021,
            arXiv 2107.07075), float64 ``(n,)``.
        correct: Whether the largest logit is the label's, bool ``(n,)``.
    """

    grad_norms: Tensor
    confidences: Tensor | None
    errors: Tensor | None
    correct: Tensor | None


def norm_sweep(
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> Tensor:
    """Return the gradient norm of every example of a data set.

    The gradient is that of the example's own loss, not clipped, with the model in
    evaluation mode. :func:`sweep` returns these norms together with confidences and
    errors.

    Args:
        model: As for :func:`sweep`.
        criterion: As for :func:`sweep`.
        data_set: As for :func:`sweep`.
        batch_size: As for :func:`sweep`.
        num_workers: As for :func:`sweep`.
        collate_fn: As for :func:`sweep`.
        progress: As for :func:`sweep`.

    Returns:
        float64 ``(n,)`` on the CPU, in the data set's order.

    Raises:
        ValueError: As :func:`sweep` does.
    """
    return sweep(
        model,
        criterion,
        data_set,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_fn,
        progress=progress,
    ).grad_norms


def sweep(
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> Sweep:
    r"""Measure every example of a data set in one pass that leaves no trace.

    Per example :math:`\|\nabla_\theta \ell_i\|_2` as
    :func:`~opacus_pi.gradients.per_example_grad_norms` defines it, and from the same
    forward pass confidence, EL2N and correctness.

    Inside ``joblib.parallel_config(backend="loky", n_jobs=4)``, or with the backend
    ``"dask"`` or ``"ray"``, joblib's workers share the sweep: each measures a run of
    whole batches. The model, the criterion, the data set and ``collate_fn`` are pickled
    for each worker. With a ``batch_size`` the numbers are those of one process to the
    last digit.

    Args:
        model: A plain module, or one wrapped by Opacus or for distributed training;
            measured in evaluation mode on the device of its parameters.
        criterion: ``criterion(outputs, targets)`` with one loss per example; a torch
            loss module may have any reduction (it is copied).
        data_set: A map-style data set with a length, of ``(x, y)`` or of dicts with
            ``"labels"`` (Hugging Face), handed over as ``model(**rest)``.
        batch_size: Examples at a time. None: 64 in the first batch, then as many as
            fit into a part of the memory, at least 64 and at most 1024. The result does
            not depend on it, except by rounding.
        num_workers: Processes that read the data set ahead; 0: this process reads it,
            or each of joblib's workers its part. The order of the examples is the same.
            A data set that draws random numbers when it is read draws others in a
            worker.
        collate_fn: Makes ``(x, y)`` batches of lists of examples; torch's by default.
        progress: Whether to show a progress bar once the sweep has taken 3 seconds.
            joblib's workers show none.

    Returns:
        The :class:`Sweep`, on the CPU.

    Raises:
        ValueError: If the data set has no length, a batch is not a pair, the criterion
            does not give one loss per example, nothing is trainable, or examples
            share batch statistics.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "collate_fn": collate_fn,
    }
    _check(data_set, batch_size, num_workers)
    num_runs = num_joblib_workers()
    if num_runs > 1:
        runs = runs_of_batches(size_of(data_set), batch_size or SMALLEST, num_runs)
        if len(runs) > 1:
            # A copy, because the hooks and states of a training cannot be pickled
            alone = evaluation_copy(model)
            measure = partial(measured, alone, criterion, progress=False, **options)
            with isolated():
                parts = run_in_workers(measure, [Subset(data_set, run) for run in runs])
            return _joined_sweeps(parts)
    return measured(model, criterion, data_set, progress=progress, **options)


def measured(
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> Sweep:
    """Do what :func:`sweep` does, in this process.

    A ``collate_fn`` that reports what it finds to an object of this process needs this.

    Args:
        model: As for :func:`sweep`.
        criterion: As for :func:`sweep`.
        data_set: As for :func:`sweep`.
        batch_size: As for :func:`sweep`.
        num_workers: As for :func:`sweep`.
        collate_fn: As for :func:`sweep`.
        progress: As for :func:`sweep`.

    Returns:
        The :class:`Sweep`, on the CPU.

    Raises:
        ValueError: As :func:`sweep` does.
    """
    _check(data_set, batch_size, num_workers)
    parts = []
    with isolated():
        engine = NormEngine(model, criterion)
        loading = {"num_workers": num_workers, "collate_fn": Collating(collate_fn)}
        batches = _Batches(data_set, loading, engine.device)
        squares = engine.squares
        if batch_size is None:
            squares = partial(in_halves, engine.squares)
        for x, y in batches(batch_size, partial(examples_at_once, model), progress):
            found, outputs = squares(x, y)
            parts.append([found.sqrt().cpu(), *_output_scores(outputs, y)])
    columns = zip(*parts, strict=True) if parts else [[torch.empty(0).double()]] * 4
    values: list[Any] = [*map(_joined, columns)]
    return Sweep(*values)


def _check(data_set: Dataset[Any], batch_size: int | None, num_workers: int) -> None:
    """Raise if a data set cannot be swept, or in such batches."""
    if batch_size is not None:
        positive(batch_size=batch_size, remedy="Try 64.")
    in_range(
        0,
        math.inf,
        num_workers=num_workers,
        remedy="Pass 0 to read the data set in this process.",
    )
    expect(
        hasattr(data_set, "__len__") and hasattr(data_set, "__getitem__"),
        "data_set",
        type(data_set).__name__,
        "must be a map-style data set with __len__ and __getitem__",
        "Put the examples in a list or in such a data set.",
    )


def _joined_sweeps(parts: Sequence[Sweep]) -> Sweep:
    """Join the sweeps of consecutive parts of a data set."""
    columns = [[getattr(part, field.name) for part in parts] for field in fields(Sweep)]
    values: list[Any] = [*map(_joined, columns)]
    return Sweep(*values)


@dataclass(frozen=True)
class _Batches:
    """Batches ``(x, y)`` of a data set in order, on a device.

    Args:
        data_set: The data set.
        loading: Options of the data loader.
        device: Where the batches go.
    """

    data_set: Dataset[Any]
    loading: dict[str, Any]
    device: torch.device

    def __call__(
        self, batch_size: int | None, chosen: Callable[[Any], int], progress: bool
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the batches, and show how many examples are done.

        Args:
            batch_size: Examples at a time; None: chosen after the first batch.
            chosen: Returns it for the inputs of the first batch.
            progress: Whether to show a bar.
        """
        size = size_of(self.data_set)
        bar = tqdm(
            desc="gradient norms",
            total=size,
            unit="example",
            delay=_SECONDS_BEFORE_BAR,
            disable=None if progress else True,  # None: on a terminal only
            leave=False,
        )
        with bar:
            for x, y in self._loaded(batch_size, chosen, size):
                yield x, y
                bar.update(num_examples(y))

    def _loaded(
        self, batch_size: int | None, chosen: Callable[[Any], int], size: int
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the batches; arguments as above."""
        if batch_size is not None:
            yield from self._part(self.data_set, batch_size)
            return
        if size <= SMALLEST:
            yield from self._part(self.data_set, SMALLEST)
            return
        for x, y in self._part(Subset(self.data_set, range(SMALLEST)), SMALLEST):
            yield x, y
            batch_size = chosen(x)
        rest = Subset(self.data_set, range(SMALLEST, size))
        yield from self._part(rest, batch_size or SMALLEST)

    def _part(
        self, data_set: Dataset[Any], batch_size: int
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of a part of the data set."""
        generator = torch.Generator()  # a loader draws a seed when it is iterated
        for batch in DataLoader(
            data_set, batch_size=batch_size, generator=generator, **self.loading
        ):
            yield to_device(inputs_and_targets(batch), self.device)


def _output_scores(outputs: Any, y: Any) -> list[Tensor | None]:
    """Return confidence, EL2N and correctness, if outputs are logits of labels.

    Args:
        outputs: The model's outputs on a batch, detached.
        y: The targets.

    Returns:
        Three tensors ``(b,)`` on the CPU, or three times ``None``.
    """
    if not _are_logits_of_labels(outputs, y):
        return [None, None, None]
    labels = y.long()[:, None]
    probabilities = outputs.double().softmax(1)
    confidences = probabilities.gather(1, labels)[:, 0]
    others = probabilities.scatter(1, labels, 0.0)
    # The label's error 1 - p is the sum of the other probabilities, which does not
    # cancel for p near 1.
    errors = torch.hypot(others.norm(dim=1), others.sum(1))
    return [confidences.cpu(), errors.cpu(), (outputs.argmax(1) == y).cpu()]


def _are_logits_of_labels(outputs: Any, y: Any) -> bool:
    """Return whether outputs are ``(b, classes)`` and targets are class indices."""
    if not (isinstance(outputs, Tensor) and isinstance(y, Tensor)):
        return False
    if outputs.dim() != 2 or outputs.shape[1] < 2 or y.shape != outputs.shape[:1]:
        return False
    return not y.is_floating_point() and bool(((y >= 0) & (y < outputs.shape[1])).all())


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    """Join the batches' values, ``None`` if a batch has none."""
    parts = [part for part in column if part is not None]
    return torch.cat(parts) if len(parts) == len(column) else None
