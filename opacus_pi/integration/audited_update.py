"""The gradients of a batch's examples: alone, and as one update records their norms.

Everything works on copies of the model and the criterion, so a training run can be
audited while it goes on.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
    floating,
    forward,
    logits_of,
    num_examples,
    rows_of,
)
from opacus_pi.models.copies import independent_copy, training_copy
from opacus_pi.models.known_losses import is_known_loss, label_mean_of
from opacus_pi.models.live_modules import LiveModules, own_parameters_only
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.own_generators import OwnGenerators
from opacus_pi.models.own_losses import CoupledLoss, Criterion, OwnLosses
from opacus_pi.recording import Recorder

__all__ = [
    "OutputGradients",
    "TrainedLoss",
    "largest_gap",
    "measuring",
    "norms_alone",
    "norms_of_copy",
    "norms_of_update",
    "quiet_copy",
    "recorded_norms",
    "rounding_of",
    "rows_by_example",
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

    def tensors(self) -> dict[int, Tensor]:
        """Return the gradients by the position of their output, as far as they came."""
        return self._found

    def by_example(self, size: int, dim: int) -> Tensor:
        """Return the gradients of all outputs, float64 ``(b, k)`` on the CPU.

        Args:
            size: The number of examples, b.
            dim: The dimension along which they are, as in ``rows_of``.
        """
        gradients = [gradient for _, gradient in sorted(self._found.items())]
        return rows_by_example([g.cpu().double() for g in gradients], size, dim)


def rows_by_example(gradients: Sequence[Tensor], size: int, dim: int) -> Tensor:
    """Return gradients of several outputs side by side, ``(b, k)``.

    Args:
        gradients: The gradients; those without a dimension of this size are left out.
        size: The number of examples, b.
        dim: The dimension along which they are, as in ``rows_of``.
    """
    parts = [torch.empty(size, 0, dtype=torch.float64)]
    for gradient in gradients:
        along = [d for d in (dim, 0, 1) if gradient.shape[d : d + 1] == (size,)]
        if along:
            parts.append(gradient.movedim(along[0], 0).reshape(size, -1))
    return torch.cat(parts[1:] or parts, dim=1)


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
    """
    if not bool(torch.isfinite(norms).all() and torch.isfinite(expected).all()):
        return "not finite (infinite or NaN)"
    ratios = norms / expected.clamp(min=1e-300)
    low, high = (f"{float(one):.3g}" for one in (ratios.min(), ratios.max()))
    return f"{low if low == high else f'{low} to {high}'} times as large"


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
