"""The losses of a batch in float64, and how each output moves its example's loss.

In float32, softmax minus one-hot cancels for examples that are fitted well, and the
norms of exactly these examples would be noise. The loss is therefore taken on float64
outputs. Norms scale with the loss, so each example's output gradient is also divided
by its length before it enters the network: a vanishing gradient does not underflow.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import forward_hooks, forward_pre_hooks
from opacus_pi.models.batches import floating, map_tensors, to_float64
from opacus_pi.models.criterion import Criterion, per_example_criterion
from opacus_pi.models.skeleton import made_by_opacus

_TINY = torch.finfo(torch.float64).tiny


def float64_losses(criterion: Criterion) -> "Losses":
    """Return ``(outputs, targets) -> losses [b]``, computed in float64.

    A criterion that cannot take float64 (it holds float32 tensors of its own) is
    called in the outputs' type instead, with a warning.

    Args:
        criterion: As for :func:`per_example_criterion`; the criterion that Opacus's
            ghost clipping returns is unwrapped.

    Returns:
        The function.
    """
    while made_by_opacus(criterion) and hasattr(criterion, "criterion"):
        criterion = criterion.criterion
    return Losses(criterion)


class Losses:
    """Per-example losses in float64, and their gradients by the outputs if known.

    Args:
        criterion: As for ``per_example_criterion``.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._has_closed_form = _is_plain_cross_entropy(criterion)
        if isinstance(criterion, nn.Module):
            criterion = copy.deepcopy(criterion).double()
        self._evaluate = per_example_criterion(criterion)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The losses ``(b,)``."""
        try:
            return self._evaluate(to_float64(outputs), to_float64(targets))
        except RuntimeError:
            values = self._evaluate(outputs, targets)
        warnings.warn(
            "The criterion refused float64 outputs; in float32 the gradient norms of "
            "well-fitted examples are inaccurate. Let it follow outputs.dtype.",
            stacklevel=2,
        )
        return values

    def closed_form(self, outputs: Any, targets: Any) -> Tensor | None:
        r"""Gradients by logits: softmax minus one-hot, float64 ``(b, classes)``.

        The label's entry :math:`p_y - 1` is minus the sum of the others, so that it
        does not cancel. ``None`` for another criterion, other kinds of targets, labels
        out of range (and those that are ignored), and away from the CPU, where
        checking labels would take a synchronisation.
        """
        if not (
            self._has_closed_form
            and isinstance(outputs, Tensor)
            and isinstance(targets, Tensor)
            and outputs.dim() == 2
            and targets.dtype is torch.int64
            and targets.shape == outputs.shape[:1]
            and outputs.is_cpu
            and targets.is_cpu
        ):
            return None
        gradients, labels = outputs.detach().double().softmax(1), targets[:, None]
        try:
            gradients.scatter_(1, labels, 0.0)
        except RuntimeError:  # a label out of range
            return None
        return gradients.scatter_(1, labels, -gradients.sum(1, keepdim=True))


def _is_plain_cross_entropy(criterion: Criterion) -> bool:
    """Whether a criterion is torch's, without weights, smoothing or hooks."""
    return (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and criterion.label_smoothing == 0.0
        and criterion.ignore_index < 0
        and not (forward_hooks(criterion) or forward_pre_hooks(criterion))
        and "forward" not in vars(criterion)
    )


def unit_cotangents(
    losses: "Losses", outputs: Any, targets: Any
) -> tuple[dict[int, Tensor], Tensor]:
    r"""Differentiate each example's loss by its outputs, scaled to unit length.

    :math:`u_i = \nabla_{f} \ell_i / s_i` with :math:`s_i = \|\nabla_{f} \ell_i\|_2`.

    Args:
        losses: Per-example losses, from :func:`float64_losses`.
        outputs: The model's outputs, a tensor or a tree of tensors ``(b, ...)``.
        targets: Its targets, length ``b``.

    Returns:
        ``u`` for each tensor of ``floating(outputs)``, in the tensor's type, and the
        lengths ``s``, float64 ``(b,)``.
    """
    known = losses.closed_form(outputs, targets)
    if known is not None:
        lengths = _lengths(known)
        return {0: _divided(known, lengths).to(outputs.dtype)}, lengths
    outputs = map_tensors(_leaf, outputs)
    inputs = floating(outputs)
    with torch.enable_grad():
        values = losses(outputs, targets)
        if inputs and values.requires_grad:
            gradients = torch.autograd.grad(
                values,
                list(inputs.values()),
                torch.ones_like(values),
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            gradients = tuple(torch.zeros_like(v) for v in inputs.values())
    units, scales = _normalised(gradients, len(values))
    return dict(zip(inputs, units, strict=True)), scales.to(values.device)


def _leaf(values: Tensor) -> Tensor:
    """The tensor cut from its graph, ready to be differentiated by."""
    values = values.detach()
    return values.requires_grad_() if values.is_floating_point() else values


def _normalised(
    gradients: Sequence[Tensor], batch_size: int
) -> tuple[list[Tensor], Tensor]:
    """Divide each example's rows by their joint length; lengths 1 where rows mix."""
    separate = all(g.dim() > 0 and len(g) == batch_size for g in gradients)
    if not gradients or not separate:
        return list(gradients), torch.ones(batch_size, dtype=torch.float64)
    flat = [g.double().reshape(batch_size, -1) for g in gradients]
    joint = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
    scales = _lengths(joint)
    units = [
        _divided(f, scales).to(g.dtype).view_as(g)
        for f, g in zip(flat, gradients, strict=True)
    ]
    return units, scales


def _lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths; the squares of small entries do not underflow."""
    largest = rows.abs().amax(1, keepdim=True).clamp(min=_TINY)
    lengths: Tensor = torch.linalg.vector_norm(rows / largest, dim=1)
    return lengths * largest[:, 0]


def _divided(rows: Tensor, lengths: Tensor) -> Tensor:
    """Rows divided by their lengths; zeros stay."""
    return rows / lengths.clamp(min=_TINY)[:, None]
