"""The gradients of a batch's examples: alone, and as one update records their norms.

Everything works on copies of the model and the criterion, so a training run can be
audited while it goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_pi._quiet import quiet
from opacus_pi.custody.function_copies import copied_if_possible
from opacus_pi.custody.probed_call import NoDropout
from opacus_pi.gradients import per_example_grad_norms
from opacus_pi.integration.audited_run import AuditedRun
from opacus_pi.models.backward_gradients import (
    gradients_by_backward,
    other_gradients_kept,
)
from opacus_pi.models.batches import (
    arguments,
    device_of,
    forward,
    logits_of,
    num_examples,
    rows_of,
)
from opacus_pi.models.copies import independent_copy, training_copy
from opacus_pi.models.known_losses import is_known_loss, label_mean_of
from opacus_pi.models.live_modules import LiveModules, own_parameters_only
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.output_gradients import OutputGradients
from opacus_pi.models.own_generators import OwnGenerators
from opacus_pi.models.own_losses import CoupledLoss, Criterion, OwnLosses
from opacus_pi.models.precision import ROUNDINGS, Precision
from opacus_pi.recording import Recorder

__all__ = [
    "TrainedLoss",
    "forward_with_precision",
    "largest_gap",
    "measuring",
    "norms_alone",
    "norms_of_copy",
    "norms_of_update",
    "quiet_copy",
    "recorded_norms",
    "rounding_of",
    "times_as_large",
    "user_criterion",
]


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

    def coupling(self, targets: Any) -> str:
        """Say why the criterion gives no example a loss of its own; empty if it does.

        Args:
            targets: The targets of a batch.
        """
        is_torchs = self._losses is None and is_known_loss(self.criterion)
        mean = label_mean_of(self.criterion) if is_torchs else None
        return "" if mean is None else mean.coupling(targets)


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
    if run.is_swept:
        return independent_copy(model)
    copied = training_copy(model)
    if not copied.training:  # otherwise single layers stay in evaluation mode
        copied.train()
    for module in copied.modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0
    return copied


def norms_of_copy(
    model: nn.Module, loss: TrainedLoss, x: Any, y: Any, run: AuditedRun
) -> Tensor:
    """Return what ``norms_alone`` does, of a copy of the model.

    Args:
        model: The model.
        loss: The criterion.
        x: Inputs of b examples.
        y: Their targets.
        run: How it is trained.

    Returns:
        float64 ``(b,)`` on the CPU.

    Raises:
        ValueError: If the copy computes with the parameters of the model.
    """
    copied = quiet_copy(model, run)
    with own_parameters_only(copied, LiveModules(model)):
        return norms_alone(copied, loss, x, y, run.batch_dim)


def norms_alone(
    model: nn.Module, loss: TrainedLoss, x: Any, y: Any, dim: int
) -> Tensor:
    """Return the norm of each example's gradient, one after the other by autograd.

    The gradients are those of ``backward()``, as in training: only these are right for
    checkpoints with ``use_reentrant=True``.

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
    norms, size = [], num_examples(y)
    for i in range(size):
        one, target = rows_of((x, y), [i], size, dim)
        value = loss(forward(model, one), target)
        gradients = gradients_by_backward(value, parameters)
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


def recorded_norms(
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
    size = num_examples(batch[1])
    if run.is_swept:
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
) -> tuple[Tensor, Any, OutputGradients]:
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
    size, recorder = num_examples(batch[2]), _ListeningRecorder()
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
        losses = getattr(value, "loss_per_sample", value)  # of ghost clipping
        with other_gradients_kept(losses, copied.parameters()):
            value.backward()
        optimizer.step()
    return recorder.norms, outputs, gradients


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two norms, relative to the largest norm.

    Infinity if a norm is not finite.
    """
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    scale = float(torch.maximum(one, other).max())
    return float((one - other).abs().max()) / max(scale, 1e-300)


def times_as_large(norms: Tensor, expected: Tensor) -> str:
    """Say how many times as large as others norms are: the range over the examples.

    Args:
        norms: float64 ``(b,)``.
        expected: The others, ``(b,)``; values below 1e-300 count as 1e-300.

    >>> times_as_large(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    '1 to 2 times as large'
    >>> times_as_large(torch.tensor([0.9952, 1.0004]), torch.ones(2))
    '0.9952 to 1.0004 times as large'
    """
    if not bool(torch.isfinite(norms).all() and torch.isfinite(expected).all()):
        return "not finite (infinite or NaN)"
    ratios = norms / expected.clamp(min=1e-300)
    ends = [float(ratios.min()), float(ratios.max())]
    low, high = _with_digits(ends)
    return f"{low if low == high else f'{low} to {high}'} times as large"


def _with_digits(ratios: Sequence[float]) -> list[str]:
    """Return ratios as text, with digits enough to tell them from 1.

    Args:
        ratios: Ratios of norms; those within 1e-6 of 1 are shown as 1.
    """
    others = [ratio for ratio in ratios if abs(ratio - 1) > 1e-6]
    for digits in range(3, 9):
        if all(f"{ratio:.{digits}g}" != "1" for ratio in others):
            break
    return [f"{ratio:.{digits}g}" for ratio in ratios]


def rounding_of(model: nn.Module, precision: Precision | None = None) -> float:
    """Return the relative difference of norms that rounding may cause.

    Args:
        model: The model.
        precision: What was noted of a pass; None: only the parameters are looked at.
    """
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    is_cpu = device_of(model).type == "cpu"
    noted = 0.0 if precision is None else precision.rounding
    return max(1e-3 if is_cpu else 1e-2, ROUNDINGS * eps, noted)


def forward_with_precision(model: nn.Module, x: Any) -> tuple[Any, Precision]:
    """Return the outputs of a model, and in which precision it computed them.

    Args:
        model: A copy of the model.
        x: Inputs of a batch.
    """
    precision = Precision()
    with precision:
        return forward(model, x), precision


@contextmanager
def measuring(*, drops: bool = False) -> Iterator[None]:
    """Restore random states and switches at the end, and show no warnings.

    Args:
        drops: Whether torch's dropout functions drop anything.
    """
    calm = nullcontext() if drops else NoDropout()
    with isolated(), OwnGenerators(), calm, quiet():
        yield
